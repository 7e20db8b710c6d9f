/** What a reader can do with the nodes of a circuit: pin, rename, group and part them. */
import { html, nothing } from "lit";
import { nameOf } from "../core/layout.js";
import { join, part, pin, refusal, rename } from "../core/supernodes.js";
import { visible } from "../core/tokens.js";

/** A line of text and the button that takes it; `act` returns why it cannot be, or nothing. */
function ask(label, button, value, act) {
  const submit = (event) => {
    event.preventDefault();
    const input = event.target.elements.name;
    const problem = act(input.value.trim());
    input.setCustomValidity(problem || "");
    if (problem) input.reportValidity();
  };
  const typed = (event) => event.target.setCustomValidity("");
  return html`<form class="uh-ask-name" @submit=${submit}><input name="name" aria-label=${label} placeholder=${label} .value=${value} autocomplete="off" spellcheck="false" maxlength="60" @input=${typed}><button>${button}</button></form>`;
}

const groupOf = (host, id) => host.view.supernodes?.find((group) => group.name === id);

/** The buttons of the node that is chosen. */
export function nodeTools(host, node) {
  const { id } = node;
  const group = groupOf(host, id);
  const call = (name) => {
    if (!group) host.change(rename(host.view, id, name === id ? "" : name));
    if (!group || name === id) return "";
    const problem = refusal(host.view, name);
    if (!problem) host.change(rename(host.view, id, name), name);
    return problem;
  };
  return html`<div class="uh-nodetools"><span class="uh-label">${visible(nameOf(node))}</span>
    <button type="button" aria-pressed=${String((host.view.pins ?? []).includes(id))} @click=${() => host.change(pin(host.view, id))}>pin</button>
    ${group ? html`<button type="button" @click=${() => host.change(part(host.view, id), null)}>ungroup</button>` : nothing}
    ${ask("name of this node", "rename", nameOf(node), call)}</div>`;
}

/** The pinned nodes, and how they become one. */
export function pinBoard(host, view) {
  const names = new Map(view.nodes.map((node) => [node.id, nameOf(node)]));
  const pins = (view.pins ?? []).filter((id) => names.has(id));
  if (!pins.length) return nothing;
  const drop = (id) =>
    html`<button type="button" title="unpin" @click=${() => host.change(pin(host.view, id))}>${visible(names.get(id))} ×<span class="uh-hidden"> unpin</span></button>`;
  const group = (name) => {
    const problem = refusal(host.view, name);
    if (!problem) host.change(join(host.view, pins, name), name);
    return problem;
  };
  return html`<div class="uh-pins" role="group" aria-label="pinned nodes"><span>pinned</span>${pins.map(drop)}${pins.length > 1
    ? ask("name of the group", "group", "", group)
    : html`<span class="uh-note">pin another to group them</span>`}</div>`;
}
