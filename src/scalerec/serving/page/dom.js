// Elements built from data, never from markup: text is always a text node. And how values are written.

const SVG = "http://www.w3.org/2000/svg";

function build(element, options, children) {
  const { text, on, css, data, ...attributes } = options ?? {};
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(css ?? {})) element.style.setProperty(name, value);
  for (const [name, value] of Object.entries(data ?? {})) element.dataset[name] = value;
  for (const [name, listener] of Object.entries(on ?? {})) element.addEventListener(name, listener);
  if (text !== undefined && text !== null) element.append(String(text));
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const h = (tag, options, ...children) => build(document.createElement(tag), options, children);
export const s = (tag, options, ...children) => build(document.createElementNS(SVG, tag), options, children);
export const $ = (selector) => document.querySelector(selector);
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function later(wait, work) {
  let timer;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => work(...given), wait);
  };
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = (n) => whole.format(n);
export const plural = (n, word, words = `${word}s`) => `${count(n)} ${n === 1 ? word : words}`;

export function show(value) {
  if (value === null || value === undefined || value === "") return "missing";
  if (Array.isArray(value)) return value.length ? value.map(show).join(", ") : "empty";
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(4)));
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}

// A probability or a score: three digits that count, never in exponents where a person would not write them.
export function score(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 0.9995 || size === 0) return value.toFixed(2);
  if (size < 0.0005) return value.toExponential(1).replace("-", "−");
  return value
    .toFixed(size < 0.0995 ? 4 : 3)
    .replace("-", "−")
    .replace(/^(−?)0\./, "$1.");
}

export const signed = (value) => (value > 0 ? "+" : "") + score(value);
export const ms = (value) => (value >= 99.5 ? value.toFixed(0) : value >= 9.95 ? value.toFixed(1) : value.toFixed(2));

// A time of the log in milliseconds since 1970, or null. `unit`: seconds in one unit of a number.
export function moment(value, unit = 1) {
  if (value === null || value === undefined) return null;
  if (typeof value === "string") {
    const at = Date.parse(/[zZ]|[+-]\d\d:?\d\d$/.test(value) || !value.includes("T") ? value : `${value}Z`);
    return Number.isNaN(at) ? null : at;
  }
  return Number(value) * unit * 1000;
}

const pad = (n) => String(n).padStart(2, "0");
const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");
export const clock = (d) => `${pad(d.getUTCHours())}:${pad(d.getUTCMinutes())}`;
export const day = (d) => `${d.getUTCDate()} ${MONTHS[d.getUTCMonth()]}`;

export function date(at) {
  const d = new Date(at);
  if (Number.isNaN(d.getTime())) return String(at);
  return `${day(d)} ${d.getUTCFullYear()}, ${clock(d)}:${pad(d.getUTCSeconds())}`;
}
