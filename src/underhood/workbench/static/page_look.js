/** Look: one prompt, everything about it at a glance, all panels linked. */
import { html, nothing } from "/static/underhood.mjs";
import { Task } from "./api.js";
import { addresses, examples, head, line, part, prompt, run } from "./parts.js";
import { go, of, put, state } from "./state.js";

export const title = "Look";
export const question = "What goes on inside?";

const task = new Task({ page: "look" });
const reading = new Task({ page: "look", key: "reading" });
const PANELS = ["next", "tokens", "lens", "attention"];

/** What the lens reads at each layer and position of the last prompt, for the inspector. */
export const readings = () => ({ ...task.newest("readings"), words: task.newest("prompt")?.tokens ?? [] });

/** Read a site of the prompt that is looked at, and go where it is shown; other pages lead here. */
export function showSite(site) {
  readSite(site);
  go("look");
  setTimeout(() => document.querySelector(".wb-tool")?.scrollIntoView(), 100);
}

function readSite(site) {
  put({ site }, "look");
  reading.start({ do: "site", model: state.model, prompt: of("look").prompt, site });
}

export function draw(facts) {
  const said = of("look");
  if (said.prompt === undefined) put({ prompt: facts.examples[0]?.prompt ?? "", site: "resid_post" }, "look");
  task.sync();
  reading.sync();
  return html`${head("Look", "Read a prompt with the model: what it says next, what each layer would say, where the heads look. Click anything to keep it selected everywhere.")}
    <form class="wb-form">
      ${examples(facts, said.prompt, (e) => put({ prompt: e.prompt }, "look"))}
      ${prompt("Prompt", said.prompt, (v) => put({ prompt: v }))}
      ${run("Look", task, () => task.start({ do: "look", model: state.model, prompt: said.prompt }), !said.prompt)}
    </form>
    ${PANELS.map((name) => task.newest(name)).filter(Boolean).map((one) => part(one))}
    ${site(facts, said)}`;
}

function site(facts, said) {
  const all = addresses(facts);
  return html`<section class="wb-tool"><h2>Any site</h2>
    <p class="wb-about">Length, mean, spread and outliers of any activation on this prompt. A name without a layer, such as
      <code>resid_post</code>, reads all layers; <code>z.1.0</code> reads one head.</p>
    <form class="wb-form wb-inline">
      ${line("Site", said.site, (v) => put({ site: v }), { list: "wb-sites" })}
      <datalist id="wb-sites">${all.map((a) => html`<option value=${a}></option>`)}</datalist>
      ${run("Read", reading, () => readSite(said.site || "resid_post"), !said.prompt)}
    </form>
    ${reading.newest("site") ? part(reading.newest("site")) : nothing}
  </section>`;
}
