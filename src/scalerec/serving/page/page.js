// The page: one person, one request, one or two models. Here is what happens; the parts show what `state` says.

import * as api from "./api.js";
import { $, count, h, show } from "./dom.js";
import { inspect } from "./inspect.js";
import { Pair, summary } from "./pair.js";
import * as panels from "./panels.js";
import { Search, anybody, look } from "./search.js";
import { failed, logOf, modelOf, nameOf, quiet, say, state, trying } from "./state.js";
import { Timeline, describe, lanesOf, lastEvent } from "./timeline.js";
import { Context, EventForm, RequestForm } from "./whatif.js";

const NARROW = matchMedia("(max-width: 759px)");

const timeline = new Timeline($("#timeline"), (event) => ($("#event").textContent = event ? describe(event) : hint()));
const pair = new Pair(select);
const context = new Context($("#context-form"), (_, cause) => run(cause));
const events = new EventForm($("#event-form"), addEvent);
const asking = new RequestForm($("#request-form"), (cause) => run(cause));
const search = new Search(open, failed);

// ---- models --------------------------------------------------------------------------------------------------------

async function boot() {
  await trying(async () => {
    state.models = await api.models();
    quiet();
    const hash = new URLSearchParams(location.hash.slice(1));
    const rankers = state.models.filter(({ ranks }) => ranks !== false);
    if (!rankers.length)
      throw new api.ServiceError("No model of this service ranks: start it with a bundle of one that does.");
    const named = (name) => rankers.find((model) => model.name === name)?.name;
    state.a =
      named(hash.get("a")) ??
      (rankers.find((model) => model.default) ?? rankers.find(({ active }) => active) ?? rankers[0]).name;
    state.b = named(hash.get("b")) ?? "";
    state.view = state.b ? "compare" : "ranking";
    const options = (chosen) =>
      rankers.map(({ name, version }) =>
        h("option", { value: name, text: name, title: version, selected: name === chosen }),
      );
    $("#model-a").replaceChildren(...options(state.a));
    $("#model-b").replaceChildren(h("option", { value: "", text: "compare with …" }), ...options(state.b));
    $("#model-b").disabled = rankers.length < 2;
    asking.build(state.models.filter(({ retrieves }) => retrieves).map(({ name }) => name));
    cards();
    forms();
    const text = hash.get("user");
    if (!text) return home();
    const { id, known } = await look(text);
    await open(id, known);
  }, boot);
}

function cards() {
  $("#cards").replaceChildren(
    ...state.models.map((model) =>
      h(
        "li",
        {},
        h("b", { text: model.name }),
        h("code", { text: model.version }),
        h("span", {
          text: [model.ranks !== false && "ranks", model.retrieves && "retrieves"].filter(Boolean).join(" and "),
        }),
        h("span", { text: `${model.precision ?? ""}${model.tasks?.length ? ` · ${model.tasks.join(", ")}` : ""}` }),
      ),
    ),
  );
}

function forms() {
  const model = modelOf("a");
  const defaults =
    state.view === "compare" && modelOf("b") ? { ...modelOf("b").context, ...model.context } : model.context;
  context.build(defaults ?? {});
  // An event goes to the histories of all models: each may need labels of its own.
  events.build([...new Set([model, ...state.models].flatMap(({ log, tasks }) => log?.labels ?? tasks ?? []))]);
}

for (const which of ["a", "b"]) {
  $(`#model-${which}`).addEventListener("change", ({ target }) => {
    const before = state[which];
    state[which] = target.value;
    if (which === "b") state.view = state.b ? "compare" : "ranking";
    forms();
    if (state.user === null) return address();
    run(which === "a" ? `Model A: ${before} → ${state.a}` : null);
  });
}

// ---- the person ----------------------------------------------------------------------------------------------------

function home() {
  $("#start").hidden = false;
  $("#story").hidden = true;
}

async function open(id, known) {
  quiet();
  Object.assign(state, { user: id, known, answers: {}, before: {}, selected: null });
  context.clear();
  await trying(
    async () => {
      await load(true);
      $("#start").hidden = true;
      $("#story").hidden = false;
      person();
      await run(null);
    },
    () => open(id, known),
  );
}

async function load(fresh) {
  const { user } = state;
  const found = state.known ? await api.user(user) : { columns: {}, history: {} };
  if (user !== state.user) throw new DOMException("another user meanwhile", "AbortError");
  state.person = found;
  state.lanes = lanesOf(state.person.history, logOf());
  asking.about(lastEvent(state.lanes), logOf(), fresh);
}

function person(fresh = null) {
  $("#person-title").textContent = `User ${show(state.user)}`;
  document.title = `User ${show(state.user)} · scalerec`;
  panels.columns($("#columns"), state.person.columns);
  timeline.update(state.lanes, { fresh });
  $("#timeline").hidden = !state.lanes.some(({ events: all }) => all.length);
  $("#event").textContent = hint();
  scale();
}

function scale() {
  const choices = timeline.timed
    ? [
        ["time", "by time"],
        ["order", "event by event"],
      ]
    : [];
  choose($("#scale"), choices, timeline.mode, (value) => {
    timeline.scale = value;
    timeline.draw();
    scale();
  });
}

function hint() {
  if (state.lanes.some(({ events: all }) => all.length))
    return "Point at an event or tap it, or go through them with the arrow keys.";
  return state.known
    ? "No history yet."
    : "Nobody knows this user: no history, no row. Add an event and see what it changes.";
}

async function addEvent(text, labels) {
  const log = logOf();
  const row = state.lanes.flatMap(({ events: all }) => all)[0];
  const { ids } = pair;
  const item = ids.find((id) => String(id) === text) ?? api.idOf(text, row?.item ?? ids[0]);
  const time = asking.time(true);
  const event = {
    event_id: random(),
    user: state.user,
    time,
    [log.item ?? row?.itemColumn ?? "item_id"]: item,
    ...labels,
  };
  await trying(async () => {
    await api.addEvent(event); // tried again by hand it is the same event: the service adds it once
    state.known = true;
    await load(false);
    person({ item });
    const done = Object.entries(labels)
      .filter(([, value]) => value)
      .map(([name]) => name);
    await run(`Event: item ${show(item)}${done.length ? `, ${done.join(" and ")}` : ", nothing done"}`);
  });
}

const random = () =>
  [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

// ---- the list ------------------------------------------------------------------------------------------------------

function bodyFor(which) {
  const known = modelOf(which)?.context ?? {};
  const given = Object.fromEntries(Object.entries(context.values).filter(([name]) => name in known));
  const body = {
    user: state.user,
    model: state[which],
    k: asking.k,
    retrieve: Math.max(asking.retrieve, asking.k),
    filter_seen: asking.filterSeen,
  };
  if (Object.keys(given).length) body.context = given;
  const time = asking.time();
  if (time !== undefined) body.time = time;
  if (asking.retriever) body.retriever = asking.retriever;
  return body;
}

// Ask again; `cause` says what was changed, null when there is nothing to compare with.
async function run(cause) {
  if (state.user === null) return;
  state.abort?.abort();
  const { signal } = (state.abort = new AbortController());
  await trying(
    async () => {
      const asked = state.b ? ["a", "b"] : ["a"];
      const bodies = Object.fromEntries(asked.map((which) => [which, bodyFor(which)]));
      const answers = await Promise.all(
        asked.map((which) =>
          api.recommend(bodies[which], signal).catch((error) => {
            if (state.b && error.name !== "AbortError") error.message = `${state[which]}: ${error.message}`;
            throw error;
          }),
        ),
      );
      const same = (which) => cause && state.answers[which];
      state.before = Object.fromEntries(
        asked.filter(same).map((which) => [which, state.answers[which].items.map(({ id }) => id)]),
      );
      state.answers = Object.fromEntries(asked.map((which, i) => [which, answers[i]]));
      state.request = bodies;
      quiet();
      render(cause);
    },
    () => run(cause),
  );
}

function address() {
  const hash = new URLSearchParams({
    ...(state.user === null ? {} : { user: state.user }),
    a: state.a,
    ...(state.b ? { b: state.b } : {}),
  });
  history.replaceState(null, "", `#${hash}`);
}

function render(cause) {
  const { a, b } = state.answers;
  if (!b) state.view = "ranking";
  address();
  panels.badges($("#person-badges"), a);
  panels.funnel($("#funnel"), { answer: a, model: modelOf("a"), shown: a.items.length });
  panels.timing(
    $("#timing"),
    Object.entries(state.answers).map(([tag, { model, timing }]) => ({ tag, name: model, timing })),
  );
  views();
  pair.draw(Boolean(cause));
  pair.moved(cause);
  raw();
  follow();
  if (!cause) say(summary());
}

// The selection goes on where it can, else to the first item.
function follow() {
  const ids = pair.ids.map(nameOf);
  select(ids.includes(state.selected) ? state.selected : (ids[0] ?? null), "auto");
}

function views() {
  const choices = state.answers.b
    ? [
        ["ranking", "Retrieval → A"],
        ["compare", "A ↔ B"],
      ]
    : [];
  choose($("#view"), choices, state.view, (value) => {
    state.view = value;
    forms();
    views();
    pair.draw(false);
    follow();
  });
}

// Buttons of which one is pressed.
function choose(place, choices, chosen, use) {
  place.replaceChildren(
    ...choices.map(([value, text]) =>
      h("button", {
        type: "button",
        text,
        "aria-pressed": String(value === chosen),
        on: {
          click: () => {
            use(value);
            place.querySelector("[aria-pressed='true']")?.focus();
          },
        },
      }),
    ),
  );
}

function raw() {
  const quoted = (body) => `'${api.write(body).replaceAll("'", "'\\''")}'`;
  const auth = api.key.get() ? ` \\\n  -H "authorization: Bearer $SCALEREC_KEY"` : "";
  const url = new URL("v1/recommend", location.href.split("#")[0]);
  $("#curl").textContent = Object.values(state.request)
    .map((body) => `curl -s ${url} \\\n  -H 'content-type: application/json'${auth} \\\n  -d ${quoted(body)}`)
    .join("\n\n");
  $("#answer").textContent = Object.values(state.answers)
    .map((answer) => {
      const { retrieved = [], ...rest } = answer;
      const few =
        retrieved.length > 5
          ? { retrieved: [...retrieved.slice(0, 5), `… ${count(retrieved.length - 5)} more`] }
          : { retrieved };
      return api.write({ ...rest, ...few }, 1);
    })
    .join("\n\n");
}

// ---- one item ------------------------------------------------------------------------------------------------------

// how: "hover" only points; "auto" follows a new list; "key" and "click" come from a person.
function select(id, how) {
  if (how === "hover") return pair.hover(id);
  state.selected = id;
  pair.mark(id);
  events.suggest(id);
  if (NARROW.matches && how === "click") sheet(true);
  inspect(pair.ids.find((one) => nameOf(one) === id));
}

// On a phone the item comes up over the list.
function sheet(up) {
  $("#item").classList.toggle("sheet", up);
  (up ? $("#close-item") : pair.nodeOf(state.selected))?.focus({ preventScroll: true });
}

$("#close-item").addEventListener("click", () => sheet(false));

// ---- start ---------------------------------------------------------------------------------------------------------

const randomUser = () =>
  trying(async () => {
    const id = await anybody();
    if (id === null)
      return failed(
        new api.ServiceError("The store is empty: fill it with `scalerec serve --seed`, or look at somebody new."),
      );
    search.input.value = String(id);
    await open(id, true);
  });

$("#random").addEventListener("click", randomUser);
$("#start-random").addEventListener("click", randomUser);
$("#start-new").addEventListener("click", async () => {
  const [like] = await api.users("", 1).catch(() => []);
  open(typeof like === "string" ? "somebody-new" : 999_999_999, false);
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, [contenteditable]");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    search.input.focus();
  } else if (event.key === "Escape" && $("#item").classList.contains("sheet")) sheet(false);
});
window.addEventListener("hashchange", boot);
if (NARROW.matches) $("#whatif").open = false;
boot();
