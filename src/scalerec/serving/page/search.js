// The search for a user: a combobox over the ids that the store knows, by prefix.

import * as api from "./api.js";
import { $, h, later } from "./dom.js";

export class Search {
  // open(id, known); failed(error)
  constructor(open, failed) {
    Object.assign(this, { open, failed, input: $("#search"), list: $("#found"), options: [], here: -1 });
    const ask = later(120, () => this.ask());
    this.input.addEventListener("input", ask);
    this.input.addEventListener("focus", () => this.input.select());
    this.input.addEventListener("keydown", (event) => this.keys(event));
    this.input.addEventListener("blur", () => this.close());
    this.list.addEventListener("pointerdown", (event) => event.preventDefault()); // the focus stays in the field
  }

  async ask() {
    const text = this.input.value.trim();
    this.abort?.abort();
    this.abort = new AbortController();
    if (!text) return this.close();
    try {
      this.show(text, await api.users(text, 8, this.abort.signal));
    } catch (error) {
      if (error.name !== "AbortError") this.failed(error);
    }
  }

  show(text, ids) {
    const exact = ids.some((id) => String(id) === text);
    this.asked = text;
    this.options = ids.map((id) => ({ id, known: true }));
    if (!exact) this.options.push({ id: api.idOf(text, ids[0]), known: false });
    this.list.replaceChildren(
      ...this.options.map(({ id, known }, i) => {
        const says = known ? String(id) : h("span", {}, h("b", { text }), " is not known: what somebody new gets");
        return h(
          "li",
          {
            id: `found-${i}`,
            role: "option",
            class: known ? "" : "new",
            "aria-selected": "false",
            on: { click: () => this.choose(i) },
          },
          says,
        );
      }),
    );
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.mark(this.options.findIndex(({ id }) => String(id) === text));
  }

  mark(i) {
    this.here = i;
    [...this.list.children].forEach((option, o) => option.setAttribute("aria-selected", String(o === i)));
    if (i >= 0) {
      this.input.setAttribute("aria-activedescendant", `found-${i}`);
      this.list.children[i].scrollIntoView({ block: "nearest" });
    } else this.input.removeAttribute("aria-activedescendant");
  }

  async keys(event) {
    const n = this.options.length;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (this.list.hidden) return this.ask();
      this.mark((this.here + (event.key === "ArrowDown" ? 1 : -1) + n) % n);
    } else if (event.key === "Escape") {
      this.close();
    } else if (event.key === "Enter" && this.input.value.trim()) {
      event.preventDefault();
      if (this.asked !== this.input.value.trim() || this.list.hidden) await this.ask(); // typed faster than asked
      if (this.options.length) this.choose(Math.max(this.here, 0));
    }
  }

  choose(i) {
    const { id, known } = this.options[i];
    this.close();
    this.input.value = String(id);
    this.open(id, known);
  }

  close() {
    this.list.hidden = true;
    this.asked = null;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
  }
}

// The id as the service writes it, and whether it knows it.
export async function look(text) {
  const ids = await api.users(text, 8);
  const found = ids.find((id) => String(id) === text);
  return found === undefined ? { id: api.idOf(text, ids[0]), known: false } : { id: found, known: true };
}

// Somebody at random: among the first thousand, or where there are more, among those of a random beginning.
export async function anybody() {
  const one = (ids) => ids[Math.floor(Math.random() * ids.length)] ?? null;
  const ids = await api.users("", 1000);
  if (ids.length < 1000 || typeof ids[0] === "string") return one(ids);
  return one(await api.users(String(10 + Math.floor(Math.random() * 90)), 1000)) ?? one(ids);
}
