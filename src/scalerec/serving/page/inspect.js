// The selected item: its columns, its scores by each model that is looked at, and which tokens carried them.

import * as api from "./api.js";
import { $, h, later, show } from "./dom.js";
import * as panels from "./panels.js";
import { compares, nameOf, ownerOf, state } from "./state.js";

const asked = new Map(); // what was asked before -> promise of its answer
const MOST = 300;

function once(name, ask) {
  if (!asked.has(name)) {
    asked.set(name, ask());
    asked.get(name).catch(() => asked.delete(name));
    if (asked.size > MOST) asked.delete(asked.keys().next().value);
  }
  return asked.get(name);
}

const fill = later(120, (blocks, id) => {
  for (const block of blocks) complete(block, id);
});

// Show the item with this id (undefined: the list is empty).
export function inspect(id) {
  $("#item-title").textContent = id === undefined ? "Item" : `Item ${show(id)}`;
  if (id === undefined)
    return $("#item-body").replaceChildren(h("p", { class: "hint", text: "Nothing is left to rank." }));
  const facts = h("dl", { class: "chips" });
  const blocks = (compares() ? ["a", "b"] : ["a"]).map((which) => about(which, id));
  const owner = (blocks.find(({ row }) => row) ?? blocks[0]).owner;
  api.item(id, owner).then((columns) => {
    const others = Object.entries(columns).filter(([, value]) => nameOf(value) !== nameOf(id)); // not the id again
    panels.columns(facts, Object.fromEntries(others));
  });
  $("#item-body").replaceChildren(facts, ...blocks.map((block) => (block.node = panels.itemOf(block))));
  fill(blocks, id);
}

function about(which, id) {
  const { items, retrieved = [], model, source, request_id: request } = state.answers[which];
  const same = (row) => nameOf(row.id) === nameOf(id);
  const place = items.findIndex(same) + 1;
  const owner = ownerOf(state.answers[which], id);
  return {
    tag: which,
    model,
    owner,
    row: items[place - 1],
    place,
    of: items.length,
    retrieved: retrieved.find(same),
    popular: source === "popularity",
    compare: compares(),
    request,
    body: body(which, id),
  };
}

function body(which, id) {
  const { user, model, context, time } = state.request[which];
  return { user, model, candidates: [id], ...(context ? { context } : {}), ...(time === undefined ? {} : { time }) };
}

async function complete(block, id) {
  if (state.selected !== nameOf(id)) return;
  const name = `${block.request} ${api.write(block.body)}`; // an event between two requests changes the answer
  try {
    block.row ??= (await once(`rank ${name}`, () => api.rank(block.body))).items[0];
    const { tokens, effect, reason } = await once(`explain ${name}`, () => api.explain(block.body));
    Object.assign(block, { reason, tokens: tokens.map((token, i) => ({ token, effect: effect[i][0] ?? 0 })) });
  } catch (error) {
    block.error = error.message;
  }
  const drawn = panels.itemOf(block);
  block.node.replaceWith(drawn);
  block.node = drawn;
}
