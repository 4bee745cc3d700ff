// A point cloud that turns: one shader, one or two clouds side by side at a seam. Draws only when something changed.

const VERTEX = `
attribute vec3 place; attribute vec3 color;
uniform mat4 view; uniform float size;
varying vec3 shade;
void main() {
  gl_Position = view * vec4(place, 1.0);
  gl_PointSize = clamp(size * -place.z / gl_Position.w, 1.0, 24.0);
  shade = color;
}`;
const FRAGMENT = `
precision mediump float; varying vec3 shade;
void main() { gl_FragColor = vec4(shade, 1.0); }`;
const START = { yaw: 0, pitch: 0, zoom: 1 };
const SWING_MS = 12000; // then it rests, and so does the battery

export class Cloud {
  constructor(canvas) {
    this.canvas = canvas;
    this.clouds = [];
    this.seam = 1;
    this.turn = { ...START };
    this.swing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
    this.pointers = new Map();
    if (this.gl) { this.prepare(); this.listen(); }
  }

  get works() { return Boolean(this.gl); }

  prepare() {
    const gl = this.gl, program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    gl.useProgram(program);
    this.at = Object.fromEntries(["place", "color"].map((name) => [name, gl.getAttribLocation(program, name)]));
    this.at.view = gl.getUniformLocation(program, "view");
    this.at.size = gl.getUniformLocation(program, "size");
    gl.enable(gl.DEPTH_TEST);
  }

  // clouds: what `points` gives, one or two.
  show(clouds) {
    const gl = this.gl;
    for (const old of this.clouds) { gl.deleteBuffer(old.places); gl.deleteBuffer(old.colors); }
    this.clouds = clouds.map(({ places, colors, spacing }) => {
      const buffers = { count: places.length / 3, spacing, center: middle(places) };
      for (const [name, data] of [["places", places], ["colors", colors]]) {
        buffers[name] = gl.createBuffer();
        gl.bindBuffer(gl.ARRAY_BUFFER, buffers[name]);
        gl.bufferData(gl.ARRAY_BUFFER, data, gl.STATIC_DRAW);
      }
      return buffers;
    });
    this.draw();
  }

  reset() { this.turn = { ...START }; this.draw(); }

  move(yaw, pitch, zoom = 1) {
    this.swing = false;
    this.turn.yaw += yaw;
    this.turn.pitch = Math.max(-1.4, Math.min(1.4, this.turn.pitch + pitch));
    this.turn.zoom = Math.max(0.2, Math.min(8, this.turn.zoom * zoom));
    this.draw();
  }

  draw() {
    if (this.waiting || this.canvas.hidden || !this.clouds.length) return;
    this.waiting = requestAnimationFrame((now) => {
      this.waiting = 0;
      this.begun ??= now;
      if (now - this.begun > SWING_MS) this.swing = false;
      if (this.swing) { this.turn.yaw = 0.35 * Math.sin((now - this.begun) / 1800); this.turn.pitch = 0.08 * Math.sin((now - this.begun) / 2300); }
      this.paint();
      if (this.swing) this.draw();
    });
  }

  paint() {
    const gl = this.gl, scale = Math.min(2, devicePixelRatio || 1);
    const width = Math.round(this.canvas.clientWidth * scale), height = Math.round(this.canvas.clientHeight * scale);
    if (this.canvas.width !== width || this.canvas.height !== height) { this.canvas.width = width; this.canvas.height = height; }
    gl.viewport(0, 0, width, height);
    gl.disable(gl.SCISSOR_TEST);
    gl.clearColor(0, 0, 0, 0);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const parts = this.clouds.length === 2 ? [[0, this.seam], [this.seam, 1]] : [[0, 1]];
    this.clouds.forEach((cloud, index) => {
      const [from, to] = parts[index].map((part) => Math.round(part * width));
      gl.enable(gl.SCISSOR_TEST);
      gl.scissor(from, 0, Math.max(0, to - from), height);
      const across = Math.min((1.7 * height) / width, 1.3) * this.turn.zoom; // of the picture's own focal length, about
      gl.uniformMatrix4fv(this.at.view, false, view(this.turn, cloud.center, across, width / height));
      gl.uniform1f(this.at.size, 0.8 * cloud.spacing * across * width); // points overlap, so that surfaces close
      for (const [name, buffer, kind, unit] of [["place", cloud.places, gl.FLOAT, false], ["color", cloud.colors, gl.UNSIGNED_BYTE, true]]) {
        gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
        gl.enableVertexAttribArray(this.at[name]);
        gl.vertexAttribPointer(this.at[name], 3, kind, unit, 0, 0);
      }
      gl.drawArrays(gl.POINTS, 0, cloud.count);
    });
  }

  listen() {
    const canvas = this.canvas, spread = () => {
      const [a, b] = [...this.pointers.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    });
    canvas.addEventListener("pointermove", (event) => {
      const last = this.pointers.get(event.pointerId);
      if (!last) return;
      const before = this.pointers.size === 2 ? spread() : 0;
      const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
      this.pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (before) this.move(0, 0, spread() / before);
      else this.move(dx / 200, dy / 200);
    });
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => { event.preventDefault(); this.move(0, 0, Math.exp(-event.deltaY / 600)); }, { passive: false });
    const keys = {
      ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1],
      "+": [0, 0, 1.15], "=": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
    };
    canvas.addEventListener("keydown", (event) => {
      if (event.key === "Home") this.reset();
      else if (keys[event.key]) this.move(...keys[event.key]);
      else return;
      event.preventDefault();
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }
}

function middle(places) {
  const depths = [];
  for (let at = 2; at < places.length; at += 3 * Math.max(1, Math.floor(places.length / 9000))) depths.push(places[at]);
  depths.sort((a, b) => a - b);
  return depths.length ? depths[Math.floor(depths.length / 2)] : -1;
}

// Turned about the cloud's middle, seen from where the camera was; columns first.
function view({ yaw, pitch }, center, across, aspect) {
  const [cy, sy, cp, sp] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  const rows = [[cy, 0, sy], [sp * sy, cp, -sp * cy], [-cp * sy, sp, cp * cy]];
  const shift = rows.map((row, axis) => (axis === 2 ? center : 0) - row[2] * center);
  const [near, far] = [Math.abs(center) / 50, Math.abs(center) * 50];
  const scale = [across, across * aspect], depth = [(far + near) / (near - far), (2 * far * near) / (near - far)];
  const out = new Float32Array(16);
  for (let column = 0; column < 4; column++) {
    const part = rows.map((row, axis) => (column < 3 ? row[column] : shift[axis]));
    out.set([scale[0] * part[0], scale[1] * part[1], depth[0] * part[2] + (column === 3 ? depth[1] : 0), -part[2]], 4 * column);
  }
  return out;
}
