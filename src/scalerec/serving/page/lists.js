// Two lists side by side and the lines between them: retrieval and ranking, or two models.

import { item } from "./api.js";
import { calm, h, s, score, show } from "./dom.js";

export const key = (id) => String(id);

// The few words that say what an item is: a title where there is one, else its first short columns.
export function words(columns, id) {
  const named = ["title", "name", "item_name", "headline"].find((name) => columns[name]);
  if (named) return String(columns[named]);
  const values = Object.entries(columns)
    .filter(
      ([name, value]) =>
        name !== "popularity" && value !== null && !Array.isArray(value) && String(value) !== String(id),
    )
    .filter(([, value]) => typeof value === "string" || Number.isInteger(value))
    .map(([, value]) => show(value));
  return [...new Set(values)].slice(0, 2).join(" · ");
}

export class Rows {
  // rows: {id, model, place, value, share (0..1), muted, gap, badge {text, kind, says}, bars [{task, p}], says}
  constructor(place, onSelect, onSide) {
    Object.assign(this, { place, onSelect, onSide, nodes: new Map(), rows: [], selected: null });
    place.addEventListener("keydown", (event) => this.keys(event));
  }

  update(rows, { name, animate = true } = {}) {
    this.place.setAttribute("aria-label", name);
    const before = new Map([...this.nodes].map(([id, { node }]) => [id, node.getBoundingClientRect().top]));
    const focused = this.place.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    const nodes = new Map();
    for (const row of rows) {
      const had = this.nodes.get(key(row.id));
      const node = had?.node ?? this.make(row);
      this.fill(node, row);
      nodes.set(key(row.id), { node, row });
    }
    this.nodes = nodes;
    this.rows = rows;
    this.place.replaceChildren(...[...nodes.values()].map(({ node }) => node));
    this.mark(this.selected);
    if (focused && nodes.has(focused)) nodes.get(focused).node.focus({ preventScroll: true });
    else if (focused) this.place.querySelector("[tabindex='0']")?.focus({ preventScroll: true });
    if (animate && before.size && !calm()) this.glide(before);
  }

  glide(before) {
    for (const [id, { node }] of this.nodes) {
      const top = node.getBoundingClientRect().top;
      const easing = "cubic-bezier(.2,.7,.2,1)";
      if (!before.has(id))
        node.animate(
          [
            { opacity: 0, transform: "translateX(12px)" },
            { opacity: 1, transform: "none" },
          ],
          { duration: 420, easing },
        );
      else if (before.get(id) !== top)
        node.animate([{ transform: `translateY(${before.get(id) - top}px)` }, { transform: "none" }], {
          duration: 620,
          easing,
        });
    }
  }

  make(row) {
    const node = h("li", { class: "row", role: "option", tabindex: "-1", data: { id: key(row.id) } });
    node.addEventListener("click", () => this.select(node.dataset.id, true));
    node.addEventListener("pointerenter", () => this.onSelect(node.dataset.id, "hover"));
    node.addEventListener("pointerleave", () => this.onSelect(null, "hover"));
    node.what = h("span", { class: "what" });
    item(row.id, row.model).then((columns) => {
      node.what.textContent = words(columns, row.id);
      node.title = node.what.textContent;
    });
    return node;
  }

  fill(node, row) {
    node.className = `row${row.muted ? " muted" : ""}${row.gap ? " gap" : ""}`;
    const badge =
      row.badge && h("span", { class: `badge ${row.badge.kind}`, text: row.badge.text, title: row.badge.says });
    const bars = (row.bars ?? []).map(({ p }, i) => h("span", { class: `bar task-${i % 6}`, css: { "--share": p } }));
    node.replaceChildren(
      h("span", { class: "place", text: row.place }),
      h("span", { class: "name" }, h("b", { text: show(row.id) }), node.what),
      badge ?? h("span", { class: "badge" }),
      h(
        "span",
        { class: "bars" },
        bars.length
          ? bars
          : row.share === undefined
            ? null
            : h("span", { class: "bar plain", css: { "--share": row.share } }),
      ),
      h("span", { class: "value", text: row.value === null ? "" : score(row.value) }),
    );
    node.setAttribute("aria-label", row.says);
  }

  mark(id) {
    this.selected = id;
    let stop = null;
    for (const [name, { node }] of this.nodes) {
      const here = name === id;
      node.setAttribute("aria-selected", String(here));
      node.setAttribute("tabindex", here ? "0" : "-1");
      if (here) stop = node;
    }
    if (!stop) this.place.firstElementChild?.setAttribute("tabindex", "0");
  }

  hover(id) {
    for (const [name, { node }] of this.nodes) node.classList.toggle("hot", name === id);
  }

  select(id, byHand = false) {
    this.nodes.get(id)?.node.focus({ preventScroll: !byHand });
    this.onSelect(id, byHand ? "click" : "key");
  }

  keys(event) {
    const ids = [...this.nodes.keys()];
    const here = ids.indexOf(document.activeElement?.dataset.id);
    const to = {
      ArrowDown: here + 1,
      ArrowUp: here - 1,
      Home: 0,
      End: ids.length - 1,
      PageDown: Math.min(here + 10, ids.length - 1),
      PageUp: Math.max(here - 10, 0),
    }[event.key];
    if (to !== undefined) {
      event.preventDefault();
      if (ids[to] !== undefined) this.select(ids[to]);
      this.nodes.get(ids[to])?.node.scrollIntoView({ block: "nearest" });
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      if (here >= 0) this.select(ids[here], true);
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      this.onSide(event.key === "ArrowLeft" ? "left" : "right", ids[here]);
    }
  }
}

export class Links {
  constructor(svg, left, right) {
    Object.assign(this, { svg, left, right, links: [], marked: null });
    new ResizeObserver(() => this.draw()).observe(svg.parentElement);
  }

  // links: {id, kind "up" | "down" | "same"}: an item that stands in both lists.
  update(links, fade = false) {
    this.links = links;
    this.draw();
    if (fade && !calm())
      this.svg.animate([{ opacity: 0 }, { opacity: 0, offset: 0.35 }, { opacity: 1 }], { duration: 750 });
  }

  draw() {
    const width = this.svg.clientWidth;
    const middle = (rows, id) => {
      const node = rows.nodes.get(id)?.node;
      return node && node.offsetTop + node.offsetHeight / 2; // both lists begin where the lines do
    };
    this.svg.setAttribute("height", Math.max(this.left.place.offsetHeight, this.right.place.offsetHeight));
    const paths = this.links.map(({ id, kind }) => {
      const [from, to] = [middle(this.left, id), middle(this.right, id)];
      const d = `M0 ${from}C${width / 2} ${from} ${width / 2} ${to} ${width} ${to}`;
      return from === undefined || to === undefined ? null : s("path", { d, class: `link ${kind}`, data: { id } });
    });
    this.svg.replaceChildren(...paths.filter(Boolean));
    this.mark(this.marked);
  }

  mark(id) {
    this.marked = id;
    for (const path of this.svg.children) path.classList.toggle("hot", path.dataset.id === id);
    const hot = this.svg.querySelector(".hot");
    if (hot) this.svg.append(hot);
  }
}
