// Talking to the service, in words a reader understands when it fails. Addresses are relative to the page, so that it
// also works behind a proxy's path.
import { readAnswer } from "./answer.js";
import { currentKey } from "./key.js";

/** What the page asks of a model: all that its weights have a head for. */
export function outputs({ contacts, actions }) {
  const has = (action, output) => (actions.includes(action) ? [output] : []);
  return [...(contacts === false ? [] : ["contacts"]), ...has("predict", "logits"), "attentions", ...has("classify", "classes")];
}

const TRIES = 5;
const LONGEST_WAIT = 60;

/** A failure to show: `kind` is network, auth, busy, refused, server or cancelled. */
class ApiError extends Error {
  constructor(kind, message, { retryAfter = null } = {}) {
    super(message);
    this.kind = kind;
    this.retryAfter = retryAfter;
  }
}

/** The models that the server has loaded. */
export async function fetchModels() {
  const response = await ask("api/v3/models/", { headers: authorization() });
  return (await response.json()).models;
}

/** Everything about one sequence. `onProgress` is told where it stands: words, and what changes fast. */
export async function encode(model, sequence, { signal, onProgress }) {
  const request = {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/x-npz, application/json;q=0.5", ...authorization() },
    body: JSON.stringify({ params: { include: outputs(model) }, items: [{ sequence }] }),
    signal,
  };
  for (let attempt = 1; ; attempt++) {
    try {
      onProgress("Computing …");
      const response = await ask(`api/v3/${encodeURIComponent(model.slug)}/encode/`, request);
      const buffer = await receive(response, onProgress);
      return readAnswer(buffer, response.headers.get("Content-Type") ?? "", sequence.length);
    } catch (error) {
      if (signal.aborted) throw new ApiError("cancelled", "Cancelled.");
      if (!(error instanceof ApiError)) throw new ApiError("server", `The server’s answer could not be read: ${error.message}.`);
      if (error.kind !== "busy" || attempt === TRIES || error.retryAfter > LONGEST_WAIT) throw error;
      const seconds = Math.max(1, error.retryAfter ?? 2);
      onProgress(`The server is busy; trying again in ${seconds} s (attempt ${attempt + 1} of ${TRIES})`);
      await wait(seconds, signal);
    }
  }
}

async function ask(address, request) {
  let response;
  try {
    response = await fetch(new URL(address, document.baseURI), request);
  } catch (error) {
    if (error.name === "AbortError") throw new ApiError("cancelled", "Cancelled.");
    throw new ApiError("network", "The server cannot be reached. Is numpyesm serve still running? Your input is kept.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The service's one error shape, or whatever a proxy in between has sent. */
async function refusal(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // Not JSON: the status has to do.
  }
  const said = complaints(body) || `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  if (response.status === 401) return new ApiError("auth", "The server asks for a valid key.");
  if (body?.code === "server.deadline") return new ApiError("server", said); // trying again would take as long
  if (response.status === 503 || response.status === 429) {
    const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
    const again = Number.isFinite(seconds) ? ` It asks to try again in ${seconds} s.` : " Try again in a while.";
    return new ApiError("busy", `The server is busy.${again}`, { retryAfter: Number.isFinite(seconds) ? seconds : null });
  }
  return new ApiError(response.status >= 500 ? "server" : "refused", said);
}

/** Messages of `error`, without the path to the item: there is only one. */
function complaints(body) {
  if (!body || typeof body !== "object") return "";
  const messages = Object.values(body.error ?? {}).flat().filter((m) => typeof m === "string");
  return messages.map((message) => message.replace(/^item \d+: /, "")).join(" ") || (typeof body.detail === "string" ? body.detail : "");
}

/** The whole body, telling how much has come. */
async function receive(response, onProgress) {
  const total = response.headers.has("Content-Encoding") ? 0 : Number(response.headers.get("Content-Length"));
  const reader = response.body.getReader();
  const parts = [];
  let size = 0;
  for (let chunk; !(chunk = await reader.read()).done; ) {
    parts.push(chunk.value);
    size += chunk.value.length;
    if (size > 1e6) onProgress("Receiving", `${megabytes(size)}${total ? ` of ${megabytes(total)}` : ""}`);
  }
  return new Blob(parts).arrayBuffer();
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

function wait(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(new ApiError("cancelled", "Cancelled."))), { once: true });
  });
}

function authorization() {
  const key = currentKey();
  return key ? { Authorization: `Token ${key}` } : {};
}
