// Maps to pictures, points and distances.

// farness of each pixel, growing with distance, or NaN.
export function farness(result, kind) {
  if (result.depth) return result.depth.map((value) => Math.log(value));
  return kind === "disparity_affine" ? result.prediction.map((value) => -value) : result.prediction;
}

// The 2nd and 98th percentile of what is finite, of at most some thousand samples.
export function ends(values) {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const kept = [];
  for (let at = 0; at < values.length; at += step) if (Number.isFinite(values[at])) kept.push(values[at]);
  kept.sort((a, b) => a - b);
  if (!kept.length) return [0, 1];
  const low = kept[Math.floor(0.02 * (kept.length - 1))], high = kept[Math.ceil(0.98 * (kept.length - 1))];
  return [low, high > low ? high : low + 1e-6];
}

export function depthPicture(result, kind, table) {
  const values = farness(result, kind), [low, high] = ends(values);
  const picture = new ImageData(result.width, result.height);
  for (let at = 0; at < values.length; at++) {
    const part = (values[at] - low) / (high - low);
    const color = Number.isFinite(part) ? table[Math.round(255 * Math.min(1, Math.max(0, part)))] : [32, 32, 32];
    picture.data.set([color[0], color[1], color[2], 255], 4 * at);
  }
  return picture;
}

// Right red, up green, towards the viewer blue: OpenCV's y and z turned round.
export function normalsPicture(result) {
  const picture = new ImageData(result.width, result.height), { normals } = result;
  for (let at = 0; at < normals.length / 3; at++) {
    for (let axis = 0; axis < 3; axis++) {
      const value = axis === 0 ? normals[3 * at] : -normals[3 * at + axis];
      picture.data[4 * at + axis] = Number.isFinite(value) ? Math.round(127.5 * (value + 1)) : 0;
    }
    picture.data[4 * at + 3] = 255;
  }
  return picture;
}

export function camera(width, height, degrees) {
  const focal = width / 2 / Math.tan((degrees * Math.PI) / 360);
  return { fx: focal, fy: focal, cx: (width - 1) / 2, cy: (height - 1) / 2 };
}

// Depth in metres, or without metres a shape: the nearest at 1 and the farthest at 4 of nobody's unit.
export function depths(result, kind) {
  if (result.depth) return result.depth;
  const values = farness(result, kind), [low, high] = ends(values);
  return values.map((value) => Math.exp(Math.log(4) * Math.min(1.05, Math.max(-0.05, (value - low) / (high - low)))));
}

export function pointAt(depth, width, lens, column, row) {
  const z = depth[row * width + column];
  return [((column - lens.cx) / lens.fx) * z, ((row - lens.cy) / lens.fy) * z, z];
}

export function distance(a, b) {
  return Math.hypot(a[0] - b[0], a[1] - b[1], a[2] - b[2]);
}

// Positions (x right, y up, z towards the viewer) and colours of the points that lie on surfaces: pixels beside a
// step in depth hang in the air and are left out.
export function points(result, kind, rgba, degrees) {
  const { width, height } = result, depth = depths(result, kind), lens = camera(width, height, degrees);
  const places = new Float32Array(3 * width * height), colors = new Uint8Array(3 * width * height);
  let count = 0;
  for (let row = 0; row < height - 1; row++) {
    for (let column = 0; column < width - 1; column++) {
      const at = row * width + column, z = depth[at];
      const steps = Math.max(depth[at + 1] / z, z / depth[at + 1], depth[at + width] / z, z / depth[at + width]);
      if (!(steps < 1.06)) continue;
      places.set([((column - lens.cx) / lens.fx) * z, -((row - lens.cy) / lens.fy) * z, -z], 3 * count);
      colors.set(rgba.data.subarray(4 * at, 4 * at + 3), 3 * count);
      count++;
    }
  }
  return { places: places.slice(0, 3 * count), colors: colors.slice(0, 3 * count), spacing: 1 / lens.fx };
}
