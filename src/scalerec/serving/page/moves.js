// What a change did to a list: pure functions over lists of ids, best first.

// before, after: ids. {moved: [{id, from, to}], entered: [{id, to}], left: [{id, from}]}, places from 1, largest first.
export function moves(before, after) {
  const places = (ids) => new Map(ids.map((id, i) => [String(id), i + 1]));
  const was = places(before);
  const is = places(after);
  const moved = after
    .map((id) => ({ id, from: was.get(String(id)), to: is.get(String(id)) }))
    .filter(({ from, to }) => from && from !== to)
    .sort((a, b) => Math.abs(b.from - b.to) - Math.abs(a.from - a.to) || a.to - b.to);
  const entered = after.filter((id) => !was.has(String(id))).map((id) => ({ id, to: is.get(String(id)) }));
  const left = before.filter((id) => !is.has(String(id))).map((id) => ({ id, from: was.get(String(id)) }));
  return { moved, entered, left };
}

const some = (parts) => (parts.length > 1 ? `${parts.slice(0, -1).join(", ")} and ${parts.at(-1)}` : parts.join(""));

// One sentence for the eye and for the screen reader.
export function sentence({ moved, entered, left }) {
  if (!moved.length && !entered.length && !left.length) return "Every item kept its place.";
  const up = moved.filter(({ from, to }) => to < from).length;
  const parts = [];
  if (up) parts.push(`${up} up`);
  if (moved.length - up) parts.push(`${moved.length - up} down`);
  if (entered.length) parts.push(`${entered.length} new`);
  if (left.length) parts.push(`${left.length} left the list`);
  const [first] = moved;
  const widest = first ? ` Largest move: item ${first.id} from place ${first.from} to ${first.to}.` : "";
  return `${some(parts)}.${widest}`;
}

// How alike two lists are: the ids they share, and Kendall's tau of those (null with fewer than two).
export function agreement(a, b) {
  const place = new Map(b.map((id, i) => [String(id), i]));
  const shared = a.filter((id) => place.has(String(id)));
  const order = shared.map((id) => place.get(String(id)));
  let concordant = 0;
  for (let i = 0; i < order.length; i += 1) {
    for (let j = i + 1; j < order.length; j += 1) concordant += order[i] < order[j] ? 1 : -1;
  }
  const pairs = (order.length * (order.length - 1)) / 2;
  return { shared: shared.length, tau: pairs ? concordant / pairs : null };
}
