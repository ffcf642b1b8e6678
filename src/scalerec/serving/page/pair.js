// The two lists as the answers have them: what retrieval found and what ranking made of it, or A beside B.

import { $, count, h, plural, score, show } from "./dom.js";
import { Links, Rows } from "./lists.js";
import { agreement, moves, sentence } from "./moves.js";
import { compares, nameOf, ownerOf, say, state } from "./state.js";

const MORE = 5; // rows that the left list may have beyond the right one

export class Pair {
  // onSelect(id as text | null, "hover" | "key" | "click")
  constructor(onSelect) {
    this.left = new Rows($("#left"), onSelect, (which, id) => this.side(which, id));
    this.right = new Rows($("#right"), onSelect, (which, id) => this.side(which, id));
    this.links = new Links($("#links"), this.left, this.right);
    this.onSelect = onSelect;
  }

  // The ids that can be selected, best first.
  get ids() {
    const first = compares() ? [this.left, this.right] : [this.right, this.left];
    return first.flatMap(({ rows }) => rows.map(({ id }) => id));
  }

  nodeOf(id) {
    return [this.right, this.left].map(({ nodes }) => nodes.get(id)?.node).find(Boolean);
  }

  mark(id) {
    this.left.mark(id);
    this.right.mark(id);
    this.links.mark(id);
  }

  hover(id) {
    this.left.hover(id);
    this.right.hover(id);
    this.links.mark(id ?? state.selected);
  }

  side(which, id) {
    const rows = this[which];
    if (!rows.rows.length || rows.place.contains(document.activeElement)) return;
    rows.select(rows.nodes.has(id) ? id : nameOf(rows.rows[0].id));
  }

  draw(animate) {
    const view = compares() ? "compare" : "ranking";
    $("#pair").dataset.view = view;
    const glide = animate && this.drawn === view;
    this.drawn = view;
    $("#legend").replaceChildren(
      ...Object.keys(state.answers.a.items[0]?.scores ?? {}).map((task, i) =>
        h("li", {}, h("i", { class: `bar task-${i % 6}`, css: { "--share": 1 } }), task),
      ),
    );
    if (view === "compare") this.compare(glide);
    else this.ranking(glide);
    $("#pair").dataset.left = this.left.rows.length ? "full" : "empty";
  }

  ranking(animate) {
    const { a } = state.answers;
    const retrieved = a.retrieved ?? [];
    const places = new Map(retrieved.map(({ id, place }) => [nameOf(id), place]));
    const popular = a.source === "popularity";
    $("#lists-title").textContent = retrieved.length
      ? `How ranking reordered ${popular ? "the popularity list" : "what retrieval found"}`
      : "The ranking";
    $("#left-title").replaceChildren(
      h("span", { text: popular ? "Most popular" : "Retrieved" }),
      !popular && a.source ? h("span", { class: "by", text: `by ${a.source}` }) : "",
    );
    $("#right-title").replaceChildren(
      h("span", { text: "Ranked" }),
      tag("a"),
      h("span", { class: "by", text: a.model }),
    );
    this.left.update(found(a, retrieved), { name: popular ? "Most popular items" : "Retrieved items", animate });
    const says = (id) =>
      places.has(nameOf(id)) && `${popular ? "popular" : "retrieved"} at place ${places.get(nameOf(id))}`;
    this.right.update(ranked("a", says), { name: `Ranked by ${a.model}`, animate });
    const rest = retrieved.length - this.left.rows.length;
    $("#more").textContent = rest > 0 ? `and ${count(rest)} more, to place ${count(retrieved.length)}` : "";
    this.links.update(linked(a.items, places), animate);
  }

  compare(animate) {
    const { a, b } = state.answers;
    const places = ({ items }) => new Map(items.map(({ id }, i) => [nameOf(id), i + 1]));
    const [inA, inB] = [places(a), places(b)];
    const { shared, tau } = agreement(
      a.items.map(({ id }) => id),
      b.items.map(({ id }) => id),
    );
    const order = tau === null ? "" : `, Kendall’s τ of their order ${score(tau)}`;
    $("#lists-title").textContent = `${shared} of ${a.items.length} items shared${order}`;
    $("#left-title").replaceChildren(tag("a"), h("span", { text: a.model }));
    $("#right-title").replaceChildren(tag("b"), h("span", { text: b.model }));
    $("#more").textContent = "";
    const other = (has, name) => (id) => has.has(nameOf(id)) && `place ${has.get(nameOf(id))} by ${name}`;
    this.left.update(ranked("a", other(inB, "B"), "not in the list of B"), {
      name: `Ranked by A, ${a.model}`,
      animate,
    });
    this.right.update(ranked("b", other(inA, "A"), "not in the list of A"), {
      name: `Ranked by B, ${b.model}`,
      animate,
    });
    this.links.update(linked(b.items, inA), animate);
  }

  // What the last change did, in words and by item; `cause` null: nothing to compare with.
  moved(cause) {
    $("#moved").hidden = !cause;
    if (!cause) return;
    const parts = Object.entries(state.before).map(([which, before]) => ({
      which,
      what: moves(
        before,
        state.answers[which].items.map(({ id }) => id),
      ),
    }));
    const tagged = parts.length > 1;
    $("#moved").replaceChildren(
      h("p", {}, h("b", { text: cause })),
      ...parts.map(({ which, what }) =>
        h("div", {}, h("p", {}, tagged && tag(which), ` ${sentence(what)}`), h("ul", {}, ...this.chips(what))),
      ),
    );
    const spoken = parts.map(({ which, what }) => (tagged ? `${which.toUpperCase()}: ` : "") + sentence(what));
    say(`${cause}. ${spoken.join(" ")}`);
  }

  chips({ moved, entered, left }) {
    const chip = (id, kind, text) =>
      h(
        "li",
        {},
        h(
          "button",
          { type: "button", class: `move ${kind}`, on: { click: () => this.onSelect(nameOf(id), "click") } },
          h("b", { text: show(id) }),
          ` ${text}`,
        ),
      );
    const [m, e, l] = [moved.slice(0, 6), entered.slice(0, 4), left.slice(0, 4)];
    const rest = moved.length + entered.length + left.length - m.length - e.length - l.length;
    return [
      ...m.map(({ id, from, to }) => chip(id, to < from ? "up" : "down", `${from} → ${to}`)),
      ...e.map(({ id, to }) => chip(id, "new", `new at ${to}`)),
      ...l.map(({ id, from }) =>
        h(
          "li",
          {},
          h(
            "span",
            { class: "move gone", title: `left from place ${from}` },
            h("b", { text: show(id) }),
            ` left ${from}`,
          ),
        ),
      ),
      ...(rest ? [h("li", { class: "hint", text: `and ${count(rest)} more` })] : []),
    ];
  }
}

const tag = (which) => h("span", { class: `tag ${which}`, text: which.toUpperCase() });

// The left list: the first that were found and all that are shown, in the order in which they were found.
function found(answer, retrieved) {
  const { items } = answer;
  const shown = new Set(items.map(({ id }) => nameOf(id)));
  let spare = items.length + MORE - retrieved.filter(({ id }) => shown.has(nameOf(id))).length;
  const rows = retrieved.filter(({ id }) => shown.has(nameOf(id)) || (spare -= 1) >= 0);
  const known = rows.map(({ similarity }) => similarity).filter(Number.isFinite);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  return rows.map(({ id, place, similarity }, i) => {
    const similar = Number.isFinite(similarity);
    const muted = !shown.has(nameOf(id));
    return {
      id,
      model: ownerOf(answer, id),
      place,
      muted,
      value: similarity,
      gap: i > 0 && place > rows[i - 1].place + 1,
      share: similar ? 0.1 + 0.9 * ((similarity - low) / (high - low || 1)) : undefined,
      says: [
        `Found at place ${place}`,
        `item ${show(id)}`,
        similar && `similarity ${score(similarity)}`,
        muted && "not among the items shown",
      ]
        .filter(Boolean)
        .join(", "),
    };
  });
}

// A ranked list; `says(id)` is what the other list makes of an item, `missing` the words where it has it not.
function ranked(which, says, missing = "") {
  return state.answers[which].items.map(({ id, score: value, scores }, i) => {
    const badge = changeOf(which, id, i + 1);
    const bars = Object.entries(scores ?? {}).map(([task, p]) => ({ task, p }));
    const words = [
      `Place ${i + 1}`,
      `item ${show(id)}`,
      `score ${score(value)}`,
      ...bars.map(({ task, p }) => `${task} ${score(p)}`),
      badge?.says,
      says(id) || missing,
    ];
    return {
      id,
      model: ownerOf(state.answers[which], id),
      place: i + 1,
      value,
      bars,
      badge,
      says: words.filter(Boolean).join(", "),
      muted: Boolean(missing) && !says(id),
    };
  });
}

function changeOf(which, id, place) {
  const before = state.before[which];
  if (!before) return null;
  const was = before.findIndex((one) => nameOf(one) === nameOf(id)) + 1;
  if (!was) return { kind: "new", text: "new", says: "not in the list before" };
  if (was === place) return null;
  const [kind, arrow] = was > place ? ["up", "▲"] : ["down", "▼"];
  return { kind, text: `${arrow}${Math.abs(was - place)}`, says: `${kind} from place ${was}` };
}

const linked = (items, places) =>
  items.flatMap(({ id }, i) => {
    const place = places.get(nameOf(id));
    return place ? [{ id: nameOf(id), kind: place > i + 1 ? "up" : place < i + 1 ? "down" : "same" }] : [];
  });

// The line for those who do not see the lists change.
export const summary = () =>
  `User ${show(state.user)}: ${plural(state.answers.a.items.length, "item")} ranked by ${state.answers.a.model}.`;
