/** What a reader makes of a circuit: pinned, named and grouped nodes; the rules of `view/supernodes.py`. */
import { nameOf } from "./layout.js";

const TOLD = 6; // members named in words

/** The graph with each group as one node, and the weights of the edges that end there summed. */
export function merged(view) {
  const groups = view.supernodes ?? [];
  if (!groups.length) return view;
  const home = new Map(groups.flatMap((group) => group.nodes.map((id) => [id, group.name])));
  const outside = view.nodes.filter((node) => !home.has(node.id));
  const nodes = [...outside, ...groups.map((group) => supernode(view, group))];
  const number = new Map(nodes.map((node, n) => [node.id, n]));
  const numbers = view.nodes.map((node) => number.get(home.get(node.id) ?? node.id));
  return { ...view, nodes, edges: edgesOf(view.edges, numbers, nodes, outside.length), supernodes: [] };
}

/** One node that stands for several. */
function supernode(view, { name, nodes }) {
  const wanted = new Set(nodes);
  const members = view.nodes.filter((node) => wanted.has(node.id));
  const mean = (key) => members.reduce((sum, node) => sum + node[key], 0) / members.length;
  const more = members.length > TOLD ? ` and ${members.length - TOLD} more` : "";
  const shared = Object.entries(members[0].at ?? {}).filter(([key, value]) =>
    members.every((node) => node.at?.[key] === value),
  );
  return {
    id: name,
    y: mean("y"),
    x: mean("x"),
    role: `group of ${members.slice(0, TOLD).map(nameOf).join(", ")}${more}`,
    at: Object.fromEntries(shared),
  };
}

/** Edges between groups, or between a group and a node, become one; those inside a group go. */
function edgesOf({ source, target, weight, inside, label }, numbers, nodes, first) {
  const made = { source: [], target: [], weight: [], inside: inside && [], label: label && [] };
  const known = new Map();
  for (let e = 0; e < source.length; e += 1) {
    const [a, b] = [numbers[source[e]], numbers[target[e]]];
    const summed = a >= first || b >= first;
    if (summed && a === b) continue;
    const at = summed ? known.get(`${a},${b}`) : undefined;
    if (at === undefined) {
      if (summed) known.set(`${a},${b}`, made.source.length);
      made.source.push(a);
      made.target.push(b);
      made.weight.push(weight[e]);
      made.inside?.push(inside[e]);
      made.label?.push(summed ? `${nameOf(nodes[a])} → ${nameOf(nodes[b])}` : label[e]);
    } else {
      if (weight[e] !== null) made.weight[at] = (made.weight[at] ?? 0) + weight[e];
      if (inside) made.inside[at] ||= inside[e];
    }
  }
  return made;
}

/** Pin a node, or let it go. */
export function pin(view, id) {
  const pins = view.pins ?? [];
  return { ...view, pins: pins.includes(id) ? pins.filter((other) => other !== id) : [...pins, id] };
}

/** Several nodes as one; groups among them are taken apart first. The new one is pinned. */
export function join(view, ids, name) {
  const groups = view.supernodes ?? [];
  const members = ids.flatMap((id) => groups.find((group) => group.name === id)?.nodes ?? [id]);
  const rest = groups.filter((group) => !ids.includes(group.name));
  const pins = (view.pins ?? []).filter((id) => !ids.includes(id));
  return { ...view, supernodes: [...rest, { name, nodes: members }], pins: [...pins, name] };
}

/** A group as its nodes again; they are pinned if it was. */
export function part(view, name) {
  const group = view.supernodes.find((one) => one.name === name);
  const supernodes = view.supernodes.filter((one) => one !== group);
  const pins = (view.pins ?? []).flatMap((id) => (id === name ? group.nodes : [id]));
  return { ...view, supernodes, pins };
}

/** Another name for a node or a group. */
export function rename(view, id, name) {
  if (!(view.supernodes ?? []).some((group) => group.name === id))
    return { ...view, nodes: view.nodes.map((node) => (node.id === id ? { ...node, label: name } : node)) };
  const supernodes = view.supernodes.map((group) => (group.name === id ? { ...group, name } : group));
  return { ...view, supernodes, pins: (view.pins ?? []).map((pin) => (pin === id ? name : pin)) };
}

/** Why a group cannot be called so; empty if it can. */
export function refusal(view, name) {
  if (!name) return "Give the group a name.";
  const taken = [...view.nodes.map((node) => node.id), ...(view.supernodes ?? []).map((group) => group.name)];
  return taken.includes(name) ? `“${name}” is the name of another node.` : "";
}
