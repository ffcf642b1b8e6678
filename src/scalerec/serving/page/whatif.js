// The forms that change something: the context of the moment, an event, how the list is asked for.

import { write } from "./api.js";
import { h, later, show } from "./dom.js";

const MINUTE = 60e3;
const LONG_AGO = 30 * 24 * 60 * MINUTE;

// The context columns of a model as fields; `changed(values, cause)` hears only what differs from the defaults.
export class Context {
  constructor(form, changed) {
    Object.assign(this, { form, changed, defaults: {}, values: {}, inputs: new Map() });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(() => this.reset()));
  }

  build(defaults) {
    if (write(defaults) === write(this.defaults) && this.inputs.size) return;
    this.defaults = defaults;
    this.values = Object.fromEntries(Object.entries(this.values).filter(([name]) => name in defaults));
    this.inputs = new Map(Object.keys(defaults).map((name) => [name, this.field(name)]));
    const names = [...this.inputs.keys()];
    this.form.replaceChildren(
      h("h3", { text: "Context of the moment" }),
      names.length
        ? h(
            "div",
            { class: "fields" },
            ...names.map((name, i) =>
              h("label", { for: `context-${i}` }, h("span", { text: name, title: name }), this.inputs.get(name)),
            ),
          )
        : h("p", { class: "hint", text: "This model reads no column that belongs to the moment." }),
      names.length ? h("button", { type: "reset", class: "quiet", text: "Back to the defaults" }) : "",
    );
    names.forEach((name, i) => this.inputs.get(name).setAttribute("id", `context-${i}`));
    this.mark();
  }

  field(name) {
    const usual = this.defaults[name];
    const react = later(350, () => this.read(name));
    const on = { input: react, change: react };
    const value = name in this.values ? String(this.values[name]) : "";
    if (typeof usual === "boolean") {
      return h(
        "select",
        { on },
        ...["", "true", "false"].map((one) =>
          h("option", { value: one, text: one || show(usual), selected: one === value }),
        ),
      );
    }
    const number = typeof usual === "number";
    return h("input", {
      type: number ? "number" : "text",
      step: number ? (Number.isInteger(usual) ? 1 : "any") : null,
      placeholder: show(usual),
      maxlength: 500,
      value,
      on,
    });
  }

  read(name) {
    const input = this.inputs.get(name);
    const usual = this.defaults[name];
    const text = input.value.trim();
    const before = this.values[name] ?? usual;
    const bad = input.validity.badInput;
    input.setAttribute("aria-invalid", String(bad));
    if (bad) return;
    const value = typeof usual === "number" ? Number(text) : typeof usual === "boolean" ? text === "true" : text;
    if (text === "") delete this.values[name];
    else this.values[name] = value;
    const now = this.values[name] ?? usual;
    this.mark();
    if (now !== before) this.changed(this.values, `${name}: ${show(before)} → ${show(now)}`);
  }

  reset() {
    const had = Object.keys(this.values);
    this.values = {};
    this.mark();
    if (had.length) this.changed(this.values, "Context back to its defaults");
  }

  // A new user begins with the defaults.
  clear() {
    this.values = {};
    for (const input of this.inputs.values()) input.value = "";
    this.mark();
  }

  mark() {
    for (const [name, input] of this.inputs) input.parentElement?.classList.toggle("changed", name in this.values);
  }
}

// An event of the user: an item and what happened.
export class EventForm {
  constructor(form, add) {
    Object.assign(this, { form, labels: [] });
    this.item = h("input", { id: "event-item", type: "text", maxlength: 200, spellcheck: "false" });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.item.value.trim() || this.item.placeholder;
      if (text) add(text, Object.fromEntries(this.boxes.map(([name, box]) => [name, box.checked ? 1 : 0])));
    });
  }

  build(labels) {
    if (labels.join("\n") === this.labels.join("\n") && this.boxes) return;
    this.labels = labels;
    this.boxes = labels.map((name, i) => [name, h("input", { type: "checkbox", checked: i === 0 })]);
    this.button = h("button", { type: "submit", class: "main", text: "Add event" });
    this.form.replaceChildren(
      h("h3", { text: "Add an event" }),
      h("div", { class: "fields" }, h("label", { for: "event-item" }, h("span", { text: "item" }), this.item)),
      h(
        "div",
        { class: "boxes", role: "group", "aria-label": "What the user did" },
        ...this.boxes.map(([name, box]) => h("label", {}, box, name)),
      ),
      this.button,
      h("p", { class: "hint", text: "It is written to the service's store and stays there." }),
    );
  }

  suggest(id) {
    this.item.placeholder = id ?? "";
  }
}

// How many, from how many, with or without what was seen, and at what time.
export class RequestForm {
  constructor(form, changed) {
    Object.assign(this, {
      form,
      changed,
      k: 20,
      retrieve: 500,
      filterSeen: true,
      retriever: "",
      mode: null,
      last: null,
    });
    form.addEventListener("submit", (event) => event.preventDefault());
  }

  build(retrievers) {
    const choose = (name, says, values, read) => {
      const select = h(
        "select",
        {
          id: `request-${name}`,
          on: {
            change: () => {
              const before = this[name];
              this[name] = read(select.value);
              this.changed(`${says}: ${this.words(name, before)} → ${this.words(name, this[name])}`);
            },
          },
        },
        ...values.map(([value, text]) => h("option", { value, text, selected: String(this[name]) === String(value) })),
      );
      return h("label", { for: `request-${name}` }, h("span", { text: says }), select);
    };
    const numbers = (...all) => all.map((n) => [n, n]);
    this.when = h("select", {
      id: "request-when",
      on: {
        change: () => {
          this.mode = this.when.value;
          this.changed(`Time: ${this.when.selectedOptions[0].text}`);
        },
      },
    });
    this.form.replaceChildren(
      h("h3", { text: "The request" }),
      h(
        "div",
        { class: "fields" },
        choose("k", "show", numbers(10, 20, 50), Number),
        choose("retrieve", "retrieve", numbers(50, 100, 500, 1000), Number),
        choose(
          "filterSeen",
          "seen items",
          [
            ["true", "left out"],
            ["false", "kept"],
          ],
          (value) => value === "true",
        ),
        retrievers.length &&
          choose(
            "retriever",
            "retriever",
            [["", "the service's"], ...[...retrievers, "popularity"].map((name) => [name, name])],
            String,
          ),
        h("label", { for: "request-when" }, h("span", { text: "time" }), this.when),
      ),
    );
    this.times();
  }

  words(name, value) {
    if (name === "filterSeen") return value ? "left out" : "kept";
    return value === "" ? "the service's" : String(value);
  }

  // The user's last event (or null) says what times make sense: an old log goes on where it ended.
  about(last, log, fresh = false) {
    Object.assign(this, { last, log });
    if (fresh) this.mode = null;
    this.times();
  }

  get at() {
    const old = this.last && Date.now() - this.last.at > LONG_AGO;
    return this.last && (this.mode ?? (old ? "after" : "now")) === "after" ? "after" : "now";
  }

  times() {
    if (!this.when) return;
    const options = [["now", "now"]];
    if (this.last) options.unshift(["after", "last + 1 min"]);
    this.when.replaceChildren(
      ...options.map(([value, text]) => h("option", { value, text, selected: value === this.at })),
    );
  }

  // The moment as the log writes times, or undefined: the service's clock.
  time(always = false) {
    if (this.at === "now" && !always) return undefined;
    const at = this.at === "after" ? this.last.at + MINUTE : Date.now();
    if (typeof this.last?.value === "string") return new Date(at).toISOString();
    const unit = this.log?.time_unit ?? 1;
    const value = at / 1000 / unit;
    return unit < 86400 ? Math.round(value) : value;
  }
}
