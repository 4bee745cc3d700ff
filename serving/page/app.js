// The page: a picture in, its maps of one model or two, a cloud, a distance, a file.

import { Cloud } from "/page/cloud.js";
import { camera, depthPicture, distance, normalsPicture, pointAt, points } from "/page/geometry.js";
import { ServerError, colors, file, infer, models, onTokenWanted } from "/page/protocol.js";

const MAX_SIDE = 768; // pixels: more would only take longer to cross the network
const $ = (id) => document.getElementById(id);
const state = { models: new Map(), table: null, picture: null, results: new Map(), marks: [], cursor: null, run: null };
const cloud = new Cloud($("cloud"));

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").className = bad ? "bad" : "";
}

function fail(error) {
  if (error.name === "AbortError") return;
  say(error instanceof ServerError && error.type ? `${error.type}: ${error.message}` : String(error.message || error), true);
}

const view = () => document.querySelector("input[name=view]:checked").value;
const shown = () => [$("model").value, ...($("other").value ? [$("other").value] : [])];
const kindOf = (name) => state.models.get(name).parameters.depth_kind;

function metres() {
  const [near, far] = ["near", "far"].map((id) => Number($(id).value.replace(",", ".")));
  return $("near").value && $("far").value ? { near, far } : {};
}

function fieldOfView() {
  const degrees = Number($("fov").value.replace(",", "."));
  return degrees > 5 && degrees < 170 ? degrees : 60;
}

// ---- the picture

async function take(source) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(source, { imageOrientation: "from-image" });
  } catch {
    return fail(new Error("This file is not a picture that the browser can read. Choose a JPEG, PNG or WebP."));
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(bitmap.width * scale);
  canvas.height = Math.round(bitmap.height * scale);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (Math.min(canvas.width, canvas.height) < 16) return fail(new Error("The picture is too small: 16 pixels a side at least."));
  state.picture = context.getImageData(0, 0, canvas.width, canvas.height);
  state.blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  state.results.clear();
  state.marks = [];
  state.cursor = null;
  if (view() === "picture") document.querySelector("input[value=depth]").checked = true;
  await estimate();
}

async function estimate() {
  if (!state.picture) return;
  state.run?.abort();
  const run = (state.run = new AbortController());
  $("busy").hidden = false;
  say("Looking ...");
  const begun = performance.now();
  try {
    const asked = shown().filter((name) => !state.results.has(name));
    const got = await Promise.all(asked.map((name) => {
      const depth = kindOf(name) ? metres() : {};
      return infer(name, state.picture, depth, run.signal);
    }));
    asked.forEach((name, index) => state.results.set(name, got[index]));
    const { width, height } = state.picture;
    say(`${width} × ${height} pixels` + (asked.length ? `, ${Math.round(performance.now() - begun)} ms` : ""));
    $("download").disabled = false;
  } catch (error) {
    fail(error);
  } finally {
    if (state.run === run) $("busy").hidden = true;
  }
  show();
}

// ---- what is seen

function pictureOf(name) {
  const result = state.results.get(name);
  if (view() === "picture" || !result) return state.picture;
  if (view() === "normals") return result.normals ? normalsPicture(result) : null;
  return result.prediction ? depthPicture(result, kindOf(name), state.table) : null;
}

function put(canvas, picture) {
  canvas.hidden = !picture;
  if (!picture) return;
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function show() {
  if (!state.picture) return;
  const names = shown(), two = names.length === 2, inSpace = view() === "points";
  const there = names.every((name) => state.results.has(name));
  $("empty").hidden = true;
  $("cloud").hidden = !(inSpace && there && cloud.works);
  if (inSpace) {
    put($("left"), there && cloud.works ? null : state.picture);
    put($("right"), null);
    if (!cloud.works) say("Points need WebGL, which this browser does not offer.", true);
    else if (there) {
      const known = names.filter((name) => state.results.get(name).prediction);
      cloud.show(known.map((name) => points(state.results.get(name), kindOf(name), state.picture, fieldOfView())));
      if (!metres().near) say("The shape without a scale: nearest and farthest in metres give it one.");
    }
  } else {
    const [left, right] = names.map(pictureOf);
    if (left === null || right === null) say("One of the models does not predict this.", true);
    put($("left"), left ?? state.picture);
    put($("right"), two ? right ?? null : null);
  }
  $("left").setAttribute("aria-label", `${view()} of the picture: arrow keys move a cursor, Enter marks a point`);
  $("compare").hidden = !two;
  [$("name-left").textContent, $("name-right").textContent] = two ? names : ["", ""];
  slide();
  measure();
}

// The part of the frame that the picture covers: the canvases keep its shape.
function area() {
  const frame = $("frame").getBoundingClientRect(), { width, height } = state.picture;
  const scale = Math.min(frame.width / width, frame.height / height);
  return { scale, x: (frame.width - width * scale) / 2, y: (frame.height - height * scale) / 2, frame };
}

function slide() {
  const part = Number($("slider").value) / 100, two = shown().length === 2 && state.picture;
  $("seam").hidden = !two;
  if (!two) return;
  const { scale, x, frame } = area(), covered = view() === "points" ? frame.width : state.picture.width * scale;
  const at = view() === "points" ? part * covered : x + part * covered;
  $("seam").style.left = `${at}px`;
  $("right").style.clipPath = `inset(0 0 0 ${at}px)`;
  cloud.seam = part;
  cloud.draw();
}

// ---- distances

function mark(column, row) {
  state.marks = state.marks.length === 2 ? [[column, row]] : [...state.marks, [column, row]];
  measure();
}

function measure() {
  const flat = state.picture && view() !== "points", { scale, x, y } = flat ? area() : {};
  const place = ([column, row]) => [x + (column + 0.5) * scale, y + (row + 0.5) * scale];
  const draw = [];
  if (flat && state.marks.length === 2) {
    const [[x1, y1], [x2, y2]] = state.marks.map(place);
    draw.push(`<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}"/>`);
  }
  for (const [point, kind] of flat ? [...state.marks.map((one) => [one, "mark"]), ...(state.cursor ? [[state.cursor, "cursor"]] : [])] : []) {
    const [px, py] = place(point);
    draw.push(`<circle class="${kind}" cx="${px}" cy="${py}" r="${kind === "mark" ? 6 : 10}"/>`);
  }
  $("marks").innerHTML = draw.join("");
  $("distance").textContent = state.marks.length === 2 ? spoken() : state.marks.length ? "One point is marked; mark another." : "";
}

function spoken() {
  const said = shown().map((name) => {
    const result = state.results.get(name);
    if (!result?.depth) return null;
    const lens = camera(result.width, result.height, fieldOfView());
    const [a, b] = state.marks.map(([column, row]) => pointAt(result.depth, result.width, lens, column, row));
    const metre = (value) => (Number.isFinite(value) ? `${value.toFixed(2)} m` : "unknown");
    return `${shown().length === 2 ? `${name}: ` : ""}${metre(distance(a, b))} apart, ${metre(a[2])} and ${metre(b[2])} away`;
  });
  return said.every(Boolean) ? said.join("; ") : "A distance needs nearest and farthest in metres.";
}

function pixelAt(event) {
  const { scale, x, y, frame } = area();
  const column = Math.floor((event.clientX - frame.left - x) / scale), row = Math.floor((event.clientY - frame.top - y) / scale);
  const inside = column >= 0 && row >= 0 && column < state.picture.width && row < state.picture.height;
  return inside ? [column, row] : null;
}

function walk(event) {
  const { width, height } = state.picture, step = event.shiftKey ? 1 : Math.ceil(width / 60);
  const [dx, dy] = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key] || [];
  if (event.key === "Escape") { state.marks = []; state.cursor = null; }
  else if (event.key === "Enter" || event.key === " ") mark(...(state.cursor || (state.cursor = [width >> 1, height >> 1])));
  else if (dx === undefined) return;
  else {
    const [column, row] = state.cursor || [width >> 1, height >> 1];
    state.cursor = [Math.min(width - 1, Math.max(0, column + dx)), Math.min(height - 1, Math.max(0, row + dy))];
  }
  event.preventDefault();
  measure();
}

// ---- files

async function download() {
  const type = $("format").value, name = $("model").value;
  try {
    let blob, ending;
    if (type === "view.png") {
      if (view() === "points") cloud.paint();
      blob = await new Promise((done) => $(view() === "points" ? "cloud" : "left").toBlob(done, "image/png"));
      ending = "png";
    } else {
      const { width, height } = state.picture, lens = camera(width, height, fieldOfView());
      say("Writing ...");
      blob = await file(name, state.blob, { ...metres(), intrinsics: Object.values(lens).join(",") }, type);
      ending = { "x-npz": "npz", "gltf-binary": "glb" }[type.split("/")[1]] || type.split("/")[1];
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `${name}.${ending}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    say(`Saved ${link.download}, ${Math.max(1, Math.round(blob.size / 1000))} kB.`);
  } catch (error) {
    fail(error);
  }
}

// ---- the camera

async function openCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("video").srcObject = stream;
    await $("video").play();
    $("camera-dialog").showModal();
  } catch (error) {
    fail(new Error(navigator.mediaDevices ? `The camera cannot be used: ${error.message}.` : "A camera needs https, or this machine's own address."));
  }
}

function closeCamera() {
  for (const track of $("video").srcObject?.getTracks() || []) track.stop();
  $("video").srcObject = null;
}

// ---- at the beginning

async function start() {
  onTokenWanted(() => new Promise((done) => {
    $("token").value = "";
    $("token-dialog").showModal();
    $("token-dialog").addEventListener("close", () => done($("token").value), { once: true });
  }));
  const [found, table] = await Promise.all([models(), colors()]);
  state.table = table;
  for (const model of found) {
    state.models.set(model.name, model);
    $("model").add(new Option(model.name));
    $("other").add(new Option(model.name));
  }
  $("other").add(new Option("nothing", "", true, true), 0);
  $("other-label").hidden = found.length < 2;
  facts();
  document.body.dataset.ready = "yes";
}

function facts() {
  const { parameters, platform } = state.models.get($("model").value);
  $("facts").textContent = [parameters.model, parameters.precision, platform.replace("densegeo_", ""), parameters.device, parameters.weights_note].filter(Boolean).join(" · ");
}

$("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); $("file").value = ""; });
for (const name of ["dragover", "dragenter"]) addEventListener(name, (event) => { event.preventDefault(); $("frame").classList.add("over"); });
for (const name of ["dragleave", "drop"]) addEventListener(name, () => $("frame").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]); });
addEventListener("paste", (event) => { const [one] = event.clipboardData.files; if (one) take(one); });
addEventListener("resize", () => { if (state.picture) { slide(); measure(); } });
$("views").addEventListener("change", show);
$("slider").addEventListener("input", slide);
$("model").addEventListener("change", () => { facts(); estimate(); });
$("other").addEventListener("change", estimate);
for (const id of ["near", "far"]) $(id).addEventListener("change", () => { state.results.clear(); estimate(); });
$("fov").addEventListener("change", show);
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("left").addEventListener("click", (event) => { const pixel = pixelAt(event); if (pixel) mark(...pixel); });
$("left").addEventListener("keydown", walk);
$("download").addEventListener("click", download);
$("camera").addEventListener("click", openCamera);
$("shoot").addEventListener("click", async () => { const frame = await createImageBitmap($("video")); $("camera-dialog").close(); take(frame); });
$("no-camera").addEventListener("click", () => $("camera-dialog").close());
$("camera-dialog").addEventListener("close", closeCamera);
start().catch(fail);
