// The service as functions: every call answers data or throws a ServiceError that says in words what happened.

const KEY = "scalerec.key";

export class ServiceError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds, where the service says so
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// Ids may be 64-bit integers, which a JavaScript number would round: those are read as BigInt and written back whole.
function parse(text) {
  if (!/\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, context) => {
    const exact = typeof value !== "number" || Number.isSafeInteger(value) || !/^-?\d+$/.test(context?.source ?? "");
    return exact ? value : BigInt(context.source);
  });
}

export function write(value, indent = 0) {
  const whole = (_, one) => (typeof one !== "bigint" ? one : JSON.rawJSON ? JSON.rawJSON(one) : Number(one));
  return JSON.stringify(value, whole, indent);
}

export const idOf = (text, like) => {
  if (typeof like === "string" || !/^-?\d{1,19}$/.test(text)) return text;
  return Number.isSafeInteger(Number(text)) ? Number(text) : BigInt(text);
};

function inWords(status, body) {
  const detail = body?.detail ?? body?.error ?? body?.message;
  const says = Array.isArray(detail)
    ? detail.map((one) => `${(one.loc ?? []).slice(1).join(".") || "request"}: ${one.msg}`).join("; ")
    : typeof detail === "object" && detail
      ? (detail.message ?? write(detail))
      : detail;
  const what =
    {
      401: "The service asks for an API key",
      403: "This key may not do that",
      404: "The service does not know it",
      409: "The service refuses it",
      413: "The request is too large",
      422: "The service does not accept the request",
      429: "Too many requests at once",
      503: "The service is busy or not ready",
      504: "The service took too long",
    }[status] ?? (status >= 500 ? "The service failed" : "The service refuses the request");
  return says ? `${what} (${status}): ${says}` : `${what} (${status}).`;
}

export async function call(path, { body, signal } = {}) {
  const headers = { accept: "application/json" };
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  let answer;
  let text;
  try {
    const method = body === undefined ? "GET" : "POST";
    answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : write(body) });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(`The service at ${location.host} does not answer: is it running?`);
  }
  let data = null;
  try {
    data = text ? parse(text) : null;
  } catch {
    if (answer.ok) throw new ServiceError(`The service answered something that is not JSON to ${path}.`, answer.status);
  }
  if (answer.ok) return data;
  throw new ServiceError(
    inWords(answer.status, data),
    answer.status,
    Number(answer.headers.get("retry-after")) || null,
  );
}

const path = (...parts) => parts.map((part) => encodeURIComponent(String(part))).join("/");

export const models = async () => (await call("v1/models")).models ?? [];
export const users = async (prefix, limit, signal) => {
  const found = await call(`v1/users?prefix=${encodeURIComponent(prefix)}&limit=${limit}`, { signal });
  return Array.isArray(found) ? found : (found.users ?? []);
};
export const user = (id, signal) => call(path("v1", "users", id), { signal });
export const recommend = (body, signal) => call("v1/recommend", { body, signal });
export const rank = (body) => call("v1/rank", { body });
export const explain = (body, signal) => call("v1/explain", { body, signal });
export const addEvent = (event) => call("v1/events", { body: { events: [event] } });

const known = new Map(); // item id as text -> promise of its columns
let running = 0;
const waiting = [];

// The columns of an item as a model's bundle has them, asked for once and four at a time.
export function item(id, model) {
  const name = `${model} ${id}`;
  if (!known.has(name)) {
    const from = `${path("v1", "items", id)}?model=${encodeURIComponent(model)}`;
    known.set(
      name,
      limited(() => call(from)).then(
        (found) => {
          const { id: _, item: __, columns, ...flat } = found ?? {};
          return columns ? { ...columns, ...flat } : flat;
        },
        () => {
          known.delete(name);
          return {};
        },
      ),
    );
  }
  return known.get(name);
}

async function limited(work) {
  if (running >= 4) await new Promise((go) => waiting.push(go));
  running += 1;
  try {
    return await work();
  } finally {
    running -= 1;
    waiting.shift()?.();
  }
}
