/** Cause: exchange, cut and drop; what does the answer hang on? */
import { html, nothing } from "/static/underhood.mjs";
import { Task } from "./api.js";
import { choice, examples, head, line, part, prompt, run, view } from "./parts.js";
import { of, put, state } from "./state.js";

export const title = "Cause";
export const question = "What does it hang on?";

const tasks = Object.fromEntries(["patch", "attribute", "circuit"].map((key) => [key, new Task({ page: "cause", key })]));
const TOOLS = {
  patch: ["Patch", "Move one activation at a time from the prompt into the contrast, and see how much of the answer comes with it. Exact."],
  attribute: ["Attribute", "The same for all edges between parts at once, estimated from gradients; the largest are checked exactly."],
  circuit: ["Circuit", "The connections that suffice. Drop one, and see what is left without it."],
};

export function draw(facts) {
  const said = of("cause");
  if (said.prompt === undefined) fill(facts.examples[0]);
  const tool = TOOLS[said.tool] ? said.tool : "patch";
  tasks[tool].sync();
  const set = (name) => (value) => put({ [name]: value });
  const found = tool === "circuit" ? circuit(said) : tasks[tool].named("view").map((one) => part(one));
  return html`${head("Cause", "Two prompts that differ in what decides the answer: what has to be moved from one to the other to move the answer?")}
    <form class="wb-form">
      ${examples(facts, said.prompt, fill)}
      <div class="wb-pair">${prompt("Prompt", said.prompt, set("prompt"))}
        ${prompt("Contrast", said.contrast, set("contrast"), { hint: "as many tokens, another answer" })}</div>
      <div class="wb-row">
        ${line("Answer", said.answer, set("answer"), { hint: "one token" })}
        ${line("Held against", said.wrong, set("wrong"), { hint: "one token" })}
      </div>
      <div class="wb-tabs" role="tablist" aria-label="Tools">${Object.entries(TOOLS).map(([id, [name]]) => html`<button type="button" role="tab"
        id="tab-${id}" aria-selected=${String(id === tool)} aria-controls="tool" tabindex=${id === tool ? 0 : -1}
        @click=${() => put({ tool: id })} @keydown=${turn}>${name}</button>`)}</div>
      <div id="tool" role="tabpanel" aria-labelledby="tab-${tool}">
        <p class="wb-about">${TOOLS[tool][1]}</p>
        ${DRAW[tool](facts, said)}
      </div>
    </form>
    ${found}`;
}

function fill(example) {
  const { prompt = "", contrast = "", answer = "", wrong = "" } = example ?? {};
  put({ prompt, contrast, answer, wrong, drop: [], add: [] }, "cause");
}

/** Arrow keys move between tabs. */
function turn(event) {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const ids = Object.keys(TOOLS);
  const now = ids.indexOf(event.currentTarget.id.slice(4));
  const next = ids[(now + step + ids.length) % ids.length];
  put({ tool: next });
  requestAnimationFrame(() => document.getElementById(`tab-${next}`)?.focus());
}

const one = (value) => (value ? [value] : []);

function method(tool, name, options) {
  const { prompt, contrast, answer, wrong } = of("cause");
  tasks[tool].start({
    do: "method", model: state.model, name, options,
    prompts: one(prompt), contrasts: one(contrast), answers: one(answer), wrong: one(wrong),
  });
}

const DRAW = {
  patch: (facts, said) => {
    const names = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z"].filter((n) => facts.writable.includes(n));
    const sites = said.sites ?? "resid_pre";
    const positions = said.positions ?? (sites === "z" ? "all" : "each");
    const before = html`${choice("What is moved", sites, names.map((n) => [n, WHAT[n]]), (v) => put({ sites: v, positions: undefined }))}
      ${choice("Where", positions, [["each", "each position by itself"], ["all", "all positions together"], ["last", "the last position"]], (v) => put({ positions: v }))}`;
    return run("Patch", tasks.patch, () => method("patch", "activation_patching", { sites, positions }), !(said.prompt && said.contrast), { before });
  },
  attribute: (facts, said) => {
    const before = choice("Estimated by", said.by ?? "eap-ig", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "exact"], (v) => put({ by: v }));
    return run("Attribute", tasks.attribute, () => method("attribute", "edge_attribution", { by: said.by ?? "eap-ig" }), !(said.prompt && said.contrast), { before });
  },
  circuit: (facts, said) => {
    const before = html`<label class="wb-said"><span>Share of the answer to keep</span><input type="number" min="0.05" max="1" step="0.05"
      .value=${said.target ?? 0.9} @input=${(e) => put({ target: Number(e.target.value), drop: [], add: [] })}></label>`;
    const find = () => (last ? judge([], []) : judge(said.drop ?? [], said.add ?? []));
    return run(last ? "Find it again" : "Find the circuit", tasks.circuit, find, !said.prompt, { before });
  },
};

const WHAT = {
  resid_pre: "the stream entering a layer",
  resid_mid: "the stream after attention",
  attn_out: "what attention writes",
  mlp_out: "what an MLP writes",
  z: "what a head reads out",
};

// The circuit and its editor ------------------------------------------------------------------------

let last = null; // the circuit that is on the page, also while the next one is judged

function judge(drop, add) {
  const { prompt, contrast, answer, wrong, target } = of("cause");
  put({ drop, add }, "cause");
  tasks.circuit.start({ do: "circuit", model: state.model, prompt, contrast, answer, wrong, target: target ?? 0.9, drop, add });
}

function circuit(said) {
  last = tasks.circuit.newest("circuit") ?? (tasks.circuit.state === "empty" ? null : last);
  if (!last) return nothing;
  const drop = said.drop ?? [];
  const add = said.add ?? [];
  const random = Math.max(...last.random);
  return html`<dl class="wb-judged" aria-label="Faithfulness" aria-busy=${String(tasks.circuit.busy)}>
      ${number("This circuit keeps", last.f)} ${number("Everything else keeps", last.rest)}
      ${number("Random ones of its size keep at most", random)} ${number("As it was found", last.f_found)}
      <div><dt>Edges</dt><dd>${last.edges.length} of ${last.total}</dd></div></dl>
    ${drop.length || add.length
      ? html`<p class="wb-changes">${drop.map((name) => chip(`without ${name}`, () => judge(drop.filter((d) => d !== name), add)))}
          ${add.map((name) => chip(`with ${name}`, () => judge(drop, add.filter((d) => d !== name))))}
          <button type="button" class="wb-link" @click=${() => judge([], [])}>undo all</button></p>`
      : html`<p class="wb-about">Drop a node or an edge below; the numbers above are measured again.</p>`}
    <div @uh-select=${(e) => e.detail.node && put({ picked: e.detail.node })}>${view(last.view)}</div>
    <div class="wb-lists">
      ${list("Nodes", last.nodes.filter((n) => n !== "input"), "drop", (name) => judge([...drop, name], add), said.picked)}
      ${list("Edges", last.edges, "drop", (name) => judge([...drop.filter((d) => d !== name), name], add.filter((a) => a !== name)), said.picked)}
      ${list("Strongest edges outside", last.offered, "add", (name) => judge(drop.filter((d) => d !== name), [...add, name]))}
    </div>`;
}

const number = (name, share) => html`<div><dt>${name}</dt><dd>${Math.round(100 * share)} %</dd></div>`;

const chip = (text, undo) => html`<span class="wb-chip">${text}<button type="button" aria-label="Undo: ${text}" @click=${undo}>×</button></span>`;

function list(name, items, verb, act, picked = "") {
  return html`<section><h3>${name} <small>${items.length}</small></h3><ul>
    ${items.map((item) => html`<li class=${picked && item.startsWith(picked) ? "wb-picked" : ""}><code>${item}</code>
      <button type="button" class="wb-quiet" aria-label="${verb} ${item}" @click=${() => act(item)}>${verb}</button></li>`)}</ul></section>`;
}
