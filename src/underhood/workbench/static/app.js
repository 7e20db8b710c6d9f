/** The frame of the workbench: model and pages on the left, the page, the shared selection. */
import { define, html, nothing, render, selection } from "/static/underhood.mjs";
import { get, Task, told } from "./api.js";
import { chosen, inspector } from "./inspector.js";
import * as cause from "./page_cause.js";
import * as change from "./page_change.js";
import * as explain from "./page_explain.js";
import * as look from "./page_look.js";
import * as methods from "./page_methods.js";
import * as model from "./page_model.js";
import * as results from "./page_results.js";
import { problem, progress } from "./parts.js";
import { choose, forget, go, link, PAGES, read, state, watch } from "./state.js";

const pages = { explain, look, cause, change, methods, results, model };

/** What is known of the server: its models, and the one that is looked at. */
const known = { models: [], first: null, facts: null, problem: null, elsewhere: null };
const loading = new Task({ heard: (part) => part?.facts?.name === state.model && settle(part.facts) });

// The secret of the address has become a cookie; it must not stay in the history.
if (location.search) history.replaceState(null, "", location.pathname + location.hash);
read();
define();
watch(update);
selection.subscribe(() => update());
addEventListener("keydown", (event) => {
  if (event.key === "Escape") selection.set(null);
});
meet();

/** Ask who is there, then for the model of this tab. */
async function meet() {
  try {
    const said = await get("/api/models");
    Object.assign(known, { models: said.models.map((m) => m.name), first: said.first });
    update();
  } catch (problem) {
    known.problem = told(problem);
    update();
  }
}

let asked = null;

/** The facts of the chosen model; it is loaded if nobody has. */
function need() {
  if (!known.first || (asked && asked === state.model)) return;
  if (state.model && !known.models.includes(state.model)) {
    known.elsewhere = state.model;
    state.model = null;
  } else if (asked) known.elsewhere = null;
  state.model ??= known.first;
  const mine = (asked = state.model);
  known.facts = known.problem = null;
  loading.clear();
  get(`/api/model?model=${encodeURIComponent(mine)}`)
    .then((said) => {
      if (mine !== asked) return;
      if (said.loaded) settle(said);
      else loading.start({ do: "load", model: mine });
    })
    .catch((problem) => {
      known.problem = told(problem);
      update();
    });
}

function settle(facts) {
  known.facts = facts;
  update();
}

let frame = 0;
let entered = null;

/** Draw again, once for all that changed in this moment. */
function update() {
  if (frame) return;
  frame = requestAnimationFrame(() => {
    frame = 0;
    need();
    const page = pages[state.page];
    if (page !== entered) (entered = page).enter?.();
    document.title = `${page.title} · ${state.model ?? ""} · underhood`;
    render(shell(page), document.body);
  });
}

function shell(page) {
  return html`<a class="uh-skip" href="#content" @click=${skip}>Skip to the page</a>
    <aside class="wb-side" aria-label="Model and pages"><div>${side()}</div></aside>
    <main id="content" tabindex="-1" class="wb-main">
      ${problem(known.problem)} ${elsewhere()}
      ${known.facts || state.page === "results" ? drawn(page) : waiting()}
    </main>
    <aside class="wb-inspect ${chosen() ? "" : "wb-idle"}" aria-label="Selection">${known.facts ? inspector(known.facts, look.readings()) : nothing}</aside>`;
}

/** A link may name a model that another server had. */
function elsewhere() {
  if (!known.elsewhere) return nothing;
  return problem({ what: "this server has no such model", given: known.elsewhere, why: `the page shows ${state.model} instead`, do: `start underhood serve ${known.elsewhere}, or choose another on the left` });
}

const TEXT = ["explain", "look", "cause", "change"]; // pages that begin with a prompt

/** The page; anybody can write a link, and one that does not fit must not leave it empty. */
function drawn(page) {
  try {
    return html`${page.draw(known.facts)} ${TEXT.includes(state.page) && known.facts && !known.facts.facts.tokenizer
      ? html`<p class="wb-about wb-wordless">This model reads no text, so this page has nothing to ask it. <button type="button" class="wb-link" @click=${() => go("model")}>See what it is made of</button>, or choose another model.</p>`
      : nothing}`;
  } catch (why) {
    console.warn(why);
    return html`${problem({ what: "this link does not fit the page", why: why.message, do: "start the page afresh" })}
      <p><button type="button" class="wb-second" @click=${() => forget()}>Start afresh</button></p>`;
  }
}

function skip(event) {
  event.preventDefault(); // the fragment holds the state of the page
  document.querySelector("main").focus();
}

function waiting() {
  return html`<header class="wb-head"><h1>${loading.state === "failed" ? "The model could not be loaded" : "Loading"}</h1></header>
    ${progress(loading)}
    ${loading.state === "failed"
      ? html`<p>Nothing else is lost: choose another model on the left, or start the server again with another name.</p>`
      : nothing}`;
}

function side() {
  const facts = known.facts;
  return html`<p class="wb-brand">underhood</p>
    <label class="wb-field"><span>Model</span>
      <select @change=${(e) => choose(e.target.value)}>
        ${known.models.map((name) => html`<option value=${name} .selected=${name === state.model}>${name}</option>`)}
      </select></label>
    ${facts
      ? html`<p class="wb-facts"><button type="button" class="wb-link" @click=${() => go("model")}>${facts.layers} layers${facts.heads ? `, ${facts.heads} heads each` : ""}, ${short(facts.facts.parameters)} parameters</button></p>`
      : nothing}
    <nav aria-label="Pages"><ul>
      ${PAGES.filter((id) => id !== "model").map((id) => html`<li><a href="#" aria-current=${state.page === id ? "page" : nothing}
        @click=${(e) => {
          e.preventDefault();
          go(id);
        }}><b>${pages[id].title}</b><span>${pages[id].question}</span></a></li>`)}
    </ul></nav>
    <p class="wb-foot"><button type="button" class="wb-link" @click=${copyLink}>Copy a link to this</button></p>`;
}

async function copyLink(event) {
  const button = event.currentTarget;
  await navigator.clipboard.writeText(link()).then(
    () => (button.textContent = "Copied"),
    () => prompt("Copy this address:", link()),
  );
  setTimeout(() => (button.textContent = "Copy a link to this"), 1500);
}

const short = (n) => (n >= 1e9 ? `${(n / 1e9).toFixed(1)} B` : n >= 1e6 ? `${(n / 1e6).toFixed(1)} M` : n >= 1e3 ? `${Math.round(n / 1e3)} k` : String(n));
