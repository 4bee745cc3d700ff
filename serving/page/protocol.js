// The server's answers: the v2 protocol in binary, and files of /v1/geometry.

let token = sessionStorage.getItem("densegeo-token") || "";
let askForToken = async () => null;

export function onTokenWanted(ask) { askForToken = ask; }

export class ServerError extends Error {
  constructor(message, type, status) { super(message); this.type = type; this.status = status; }
}

async function send(path, options = {}) {
  for (;;) {
    let answer;
    const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached. Is it still running?", "Unreachable", 0);
    }
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({ error: `The server answered ${answer.status}.`, type: "Unknown" }));
    if (answer.status !== 401) throw new ServerError(said.error, said.type, answer.status);
    const given = await askForToken();
    if (!given) throw new ServerError(said.error, said.type, 401);
    token = given;
    sessionStorage.setItem("densegeo-token", token);
  }
}

export async function models() {
  const { models: names } = await (await send("/v2/models")).json();
  return Promise.all(names.map(async (name) => (await send(`/v2/models/${encodeURIComponent(name)}`)).json()));
}

// rgba: ImageData. metres: {near, far} or {}. Resolves to {width, height, prediction, normals, depth} of Float32Arrays.
export async function infer(model, rgba, metres, signal) {
  const { width, height, data } = rgba;
  const header = new TextEncoder().encode(JSON.stringify({
    inputs: [{ name: "image", datatype: "UINT8", shape: [height, width, 3], parameters: { binary_data_size: width * height * 3 } }],
    parameters: { binary_data_output: true, ...metres },
  }));
  const body = new Uint8Array(header.length + width * height * 3);
  body.set(header);
  for (let from = 0, to = header.length; from < data.length; from += 4) {
    body[to++] = data[from]; body[to++] = data[from + 1]; body[to++] = data[from + 2];
  }
  const answer = await send(`/v2/models/${encodeURIComponent(model)}/infer`, {
    method: "POST", body, signal,
    headers: { "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": String(header.length) },
  });
  const bytes = await answer.arrayBuffer();
  const length = Number(answer.headers.get("Inference-Header-Content-Length"));
  const described = JSON.parse(new TextDecoder().decode(bytes.slice(0, length)));
  const result = { width, height };
  let at = length;
  for (const output of described.outputs) {
    const size = output.parameters.binary_data_size;
    result[output.name] = new Float32Array(bytes.slice(at, at + size)); // little-endian, as every browser's machine
    at += size;
  }
  return result;
}

// Resolves to a Blob of the media type.
export async function file(model, picture, fields, type) {
  const form = new FormData();
  form.append("image", picture, "picture");
  form.append("model", model);
  for (const [name, value] of Object.entries(fields)) form.append(name, value);
  return (await send("/v1/geometry", { method: "POST", body: form, headers: { Accept: type } })).blob();
}

export async function colors() {
  return (await send("/page/colors.json")).json();
}
