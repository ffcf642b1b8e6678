// A user's history as an SVG: one lane for each sequence, time to the right, one dot for each event.

import { clock, count, date, day, moment, s, show } from "./dom.js";

const LANE = 46;
const AXIS = 26;
const R = 4;
const MINUTE = 60e3;
const DAY = 24 * 60 * MINUTE;
const STEPS = [
  1e3,
  5e3,
  15e3,
  MINUTE / 2,
  MINUTE,
  5 * MINUTE,
  15 * MINUTE,
  30 * MINUTE,
  60 * MINUTE,
  3 * 60 * MINUTE,
  6 * 60 * MINUTE,
  12 * 60 * MINUTE,
  DAY,
  2 * DAY,
  7 * DAY,
  14 * DAY,
  30 * DAY,
  91 * DAY,
  182 * DAY,
  365.25 * DAY,
  730.5 * DAY,
  1826 * DAY,
  3652.5 * DAY,
  7305 * DAY,
];

// history {sequence: [{column: value}]}, log {item, time, time_unit} -> lanes of events with their moments.
export function lanesOf(history, log) {
  return Object.entries(history ?? {}).map(([name, entries]) => {
    const keys = Object.keys(entries[0] ?? {});
    const time = keys.includes(log.time) ? log.time : keys.find((key) => key === "time" || key.endsWith("_time"));
    const item = keys.includes(log.item) ? log.item : keys.find((key) => key !== time);
    return {
      name,
      events: entries.map((entry, i) => ({
        lane: name,
        i,
        of: entries.length,
        entry,
        item: entry[item],
        value: entry[time],
        itemColumn: item,
        timeColumn: time,
        at: moment(entry[time], log.time_unit ?? 1),
      })),
    };
  });
}

export const lastEvent = (lanes) =>
  lanes
    .flatMap(({ events }) => events)
    .filter(({ at }) => at !== null)
    .sort((a, b) => a.at - b.at)
    .at(-1) ?? null;

export function describe({ lane, i, of, entry, item, itemColumn, timeColumn, at }) {
  const rest = Object.entries(entry).filter(([name]) => name !== itemColumn && name !== timeColumn);
  const more = rest.map(([name, value]) => `${name} ${show(value)}`).join(", ");
  const when = at === null ? "" : `${date(at)} UTC · `;
  return `${when}${lane} · item ${show(item)}${more ? ` · ${more}` : ""} · ${i + 1} of ${of} kept`;
}

export class Timeline {
  // onEvent(event | null) is told what is looked at.
  constructor(place, onEvent) {
    this.place = place;
    this.onEvent = onEvent;
    this.lanes = [];
    this.scale = null; // "time" or "order"; null: what suits
    new ResizeObserver(() => this.width !== place.clientWidth && this.draw()).observe(place);
  }

  update(lanes, { fresh = null } = {}) {
    this.lanes = lanes;
    this.fresh = fresh; // event to point out: {item, at}
    this.draw();
  }

  get timed() {
    return this.lanes.some(({ events }) => events.some(({ at }) => at !== null));
  }

  // The scale in use: by time unless most events would lie on top of one another.
  get mode() {
    if (!this.timed) return "order";
    if (this.scale) return this.scale;
    const longest = [...this.lanes]
      .sort((a, b) => b.events.length - a.events.length)[0]
      .events.filter(({ at }) => at !== null);
    const [low, high] = this.span();
    const cells = new Set(longest.map(({ at }) => Math.floor(((at - low) / (high - low || 1)) * 100)));
    return longest.length < 4 || cells.size >= longest.length / 3 ? "time" : "order";
  }

  span() {
    const times = this.lanes.flatMap(({ events }) => events.map(({ at }) => at)).filter((at) => at !== null);
    return [Math.min(...times), Math.max(...times)];
  }

  draw() {
    const width = (this.width = this.place.clientWidth);
    if (!width || !this.lanes.length) return this.place.replaceChildren();
    const label = width < 560 ? 0 : 132;
    const lane = label ? LANE : LANE + 14;
    const box = { left: label + R + 2, right: width - R - 14, bottom: this.lanes.length * lane };
    const most =
      this.mode === "time"
        ? 0
        : new Set(this.lanes.flatMap(({ events }) => events.map(({ at, item, i }) => `${at ?? i} ${item}`))).size;
    this.radius = Math.min(R, Math.max(2, (box.right - box.left) / most / 2));
    const x = this.mode === "time" ? this.byTime(box) : this.byOrder(box);
    const svg = s("svg", {
      width,
      height: box.bottom + AXIS,
      class: "timeline",
      role: "group",
      "aria-label": "History: events in order of time",
    });
    this.axis(svg, x, box);
    this.dots = this.lanes.map(({ name, events }, l) => {
      const y = l * lane + (label ? lane / 2 : lane / 2 + 8);
      const total = events.length ? count(events.length) : "none yet";
      svg.append(s("line", { x1: label, x2: width, y1: (l + 1) * lane, y2: (l + 1) * lane, class: "rule" }));
      svg.append(s("text", { x: 0, y: label ? y - 1 : l * lane + 13, class: "lane", text: name }));
      svg.append(
        s("text", {
          x: label ? 0 : width - 2,
          y: label ? y + 14 : l * lane + 13,
          class: label ? "dim" : "dim end",
          text: total,
        }),
      );
      return this.row(svg, events, x, y, l);
    });
    const all = this.dots.flat();
    (all.find(({ event }) => this.isFresh(event)) ?? this.dots[0].at(-1) ?? all.at(-1))?.mark.setAttribute(
      "tabindex",
      "0",
    );
    this.place.replaceChildren(svg);
  }

  isFresh(event) {
    return this.fresh && String(event.item) === String(this.fresh.item) && event.i === event.of - 1;
  }

  // Dots that would cover one another stand above and below the lane's middle, up to five deep.
  row(svg, events, x, y, l) {
    const ends = [-Infinity, -Infinity, -Infinity, -Infinity, -Infinity];
    const r = this.radius;
    return events.map((event, i) => {
      const cx = x(event);
      const free = ends.findIndex((end) => end <= cx - 2 * r + 0.5);
      const depth = free < 0 ? i % ends.length : free;
      ends[depth] = cx;
      const cy = y + (depth % 2 ? 1 : -1) * Math.ceil(depth / 2) * (2 * r + 0.5);
      const mark = s("circle", {
        cx,
        cy,
        r,
        class: `dot lane-${l % 4}${this.isFresh(event) ? " fresh" : ""}`,
        role: "img",
        tabindex: "-1",
        "aria-label": describe(event),
        data: { item: String(event.item) },
        on: {
          pointerenter: () => this.look(event),
          pointerleave: () => this.look(null),
          focus: () => this.look(event),
          blur: () => this.look(null),
          click: () => mark.focus(),
          keydown: (key) => this.step(key, l, i),
        },
      });
      svg.append(mark);
      return { event, mark, cx };
    });
  }

  look(event) {
    for (const { event: other, mark } of this.dots.flat()) {
      mark.classList.toggle("same", event !== null && String(other.item) === String(event.item));
    }
    this.onEvent(event);
  }

  step(key, l, i) {
    const row = this.dots[l];
    const here = row[i];
    const near = (lane) => lane && [...lane].sort((a, b) => Math.abs(a.cx - here.cx) - Math.abs(b.cx - here.cx))[0];
    const beside = (by) => {
      for (let lane = l + by; this.dots[lane]; lane += by) if (this.dots[lane].length) return near(this.dots[lane]);
    };
    const go = {
      ArrowLeft: () => row[i - 1],
      ArrowRight: () => row[i + 1],
      Home: () => row[0],
      End: () => row.at(-1),
      ArrowUp: () => beside(-1),
      ArrowDown: () => beside(1),
    }[key.key];
    if (!go) return;
    key.preventDefault();
    const next = go();
    if (!next) return;
    here.mark.setAttribute("tabindex", "-1");
    next.mark.setAttribute("tabindex", "0");
    next.mark.focus();
  }

  byTime({ left, right }) {
    const [low, high] = this.span();
    return ({ at }) => (at === null ? left : left + ((at - low) / (high - low || 1)) * (high > low ? right - left : 0));
  }

  byOrder({ left, right }) {
    if (!this.timed) {
      const longest = Math.max(...this.lanes.map(({ events }) => events.length), 2);
      return ({ i, of }) => right - ((of - 1 - i) / (longest - 1)) * (right - left);
    }
    // One step for each event, the same in all lanes.
    const step = ({ at, item }) => `${at} ${item}`;
    const all = new Map(this.lanes.flatMap(({ events }) => events.map((event) => [step(event), event])));
    const steps = new Map([...all].sort(([, a], [, b]) => a.at - b.at).map(([name], i) => [name, i]));
    this.steps = [...all.values()].sort((a, b) => a.at - b.at);
    return (event) => left + (steps.get(step(event)) / Math.max(steps.size - 1, 1)) * (right - left);
  }

  axis(svg, x, { left, right, bottom }) {
    const y = bottom + 17;
    const tick = (at, text, end = false) => {
      svg.append(s("line", { x1: at, x2: at, y1: 0, y2: bottom + 4, class: "grid" }));
      svg.append(s("text", { x: at, y, class: end ? "tick end" : at < 40 ? "tick start" : "tick", text }));
    };
    if (!this.timed) {
      svg.append(
        s("text", { x: left, y, class: "tick start", text: "older" }),
        s("text", { x: right, y, class: "tick end", text: "newer" }),
      );
      return;
    }
    if (this.mode === "time") return this.timeTicks(tick, x, left, right);
    let last = -Infinity;
    let before = null;
    for (const event of this.steps) {
      const cx = x(event);
      const newDay = before === null || event.at - before > DAY / 2;
      before = event.at;
      if (cx - last < (newDay ? 88 : 170) || cx > right - 30) continue;
      const now = new Date(event.at);
      tick(cx, newDay ? `${day(now)} ${now.getUTCFullYear()}` : `${day(now)}, ${clock(now)}`);
      last = cx < 40 ? cx + 34 : cx; // the first label begins at its tick
    }
  }

  timeTicks(tick, x, left, right) {
    const [low, high] = this.span();
    const wanted = Math.max(2, Math.floor((right - left) / 96));
    const step = STEPS.find((one) => (high - low) / one <= wanted) ?? STEPS.at(-1);
    if (high === low) return tick(x({ at: low }), date(low));
    let shown = "";
    for (let at = Math.ceil(low / step) * step; at <= high; at += step) {
      const d = new Date(at);
      const long = step >= 365 * DAY ? String(d.getUTCFullYear()) : step >= DAY ? day(d) : `${clock(d)}`;
      const part = step >= 365 * DAY ? "" : step >= DAY ? ` ${d.getUTCFullYear()}` : ` ${day(d)}`;
      const cx = x({ at });
      tick(cx, part !== shown ? long + part : long, cx > right - 30);
      shown = part;
    }
  }
}
