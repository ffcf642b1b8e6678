// What the page is about at this moment. Only page.js changes it; the parts read it.

import { $, h, plural } from "./dom.js";
import { ServiceError, key } from "./api.js";

export const state = {
  models: [],
  a: "",
  b: "", // the service's models, and the names of those that are looked at
  view: "ranking", // or "compare": A beside B
  user: null,
  known: false,
  person: null,
  lanes: [], // {columns, history}, and the history as the timeline wants it
  request: {},
  answers: {},
  before: {}, // by "a" | "b": what was sent, what came, and the ids before the last change
  selected: null, // the item that is looked at, as text
};

export const nameOf = (id) => String(id); // ids are compared as text: numbers, 64-bit numbers and texts alike
export const modelOf = (which) => state.models.find(({ name }) => name === state[which]);
export const logOf = () => modelOf("a")?.log ?? {};
export const compares = () => state.view === "compare" && Boolean(state.answers.b);

// The model whose bundle has the item: the one that found it, where the one that ranked does not know it.
export function ownerOf(answer, id) {
  const unknown = (answer.unknown_items ?? []).some((one) => nameOf(one) === nameOf(id));
  const finder =
    state.models.find(({ name }) => name === answer.source) ?? state.models.find(({ retrieves }) => retrieves);
  return unknown && finder ? finder.name : answer.model;
}

// Tell a screen reader.
export function say(text) {
  $("#live").textContent = "";
  setTimeout(() => ($("#live").textContent = text), 30);
}

export function quiet() {
  $("#alert").hidden = true;
  $("#alert").replaceChildren();
}

// An error in words, with a way to go on; `again` does it once more.
export function failed(error, again = null) {
  if (error.name === "AbortError") return;
  if (error.status === 401) return askKey(again);
  const end = /[.?!]$/.test(error.message) ? "" : ".";
  const wait = error.retryAfter ? ` It asks to wait ${plural(error.retryAfter, "second")}.` : "";
  $("#alert").replaceChildren(
    h("p", { text: error.message + end + wait }),
    again && h("button", { type: "button", text: "Try again", on: { click: () => (quiet(), again()) } }),
    h("button", { type: "button", class: "quiet", text: "Close", on: { click: quiet } }),
  );
  $("#alert").hidden = false;
  if (!(error instanceof ServiceError)) console.error(error);
}

let turn = 0;

// Work that may fail, with the line at the top moving meanwhile.
export async function trying(work, again = work) {
  $("#busy").hidden = false;
  turn += 1;
  const mine = turn;
  try {
    return await work();
  } catch (error) {
    failed(error, again);
  } finally {
    if (mine === turn) $("#busy").hidden = true;
  }
}

let afterKey = null;

export function askKey(again) {
  afterKey = again ?? afterKey;
  $("#open-key").hidden = false;
  $("#key-title").textContent = key.get() ? "This key is not accepted" : "API key";
  $("#key-dialog").returnValue = "";
  if (!$("#key-dialog").open) $("#key-dialog").showModal();
  $("#key").select();
}

$("#open-key").addEventListener("click", () => askKey());
$("#key-cancel").addEventListener("click", () => $("#key-dialog").close("without"));
$("#key-dialog").addEventListener("cancel", () => ($("#key-dialog").returnValue = "without"));
$("#key-dialog").addEventListener("close", ({ target }) => {
  if (target.returnValue === "without")
    failed(new ServiceError("Without a key this service shows nothing of its users."), afterKey);
});
$("#key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set($("#key").value.trim());
  $("#key").value = "";
  $("#key-dialog").close("with");
  quiet();
  afterKey?.();
});
