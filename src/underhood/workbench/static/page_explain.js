/** Explain: why does the model say that? The report, part by part as it is found. */
import { html, nothing } from "/static/underhood.mjs";
import { Task } from "./api.js";
import { evidence, examples, head, line, prompt, run } from "./parts.js";
import { of, put, state } from "./state.js";

export const title = "Explain";
export const question = "Why does it say that?";

const task = new Task({ page: "explain" });

export function draw(facts) {
  const said = of("explain");
  if (said.prompt === undefined) fill(facts.examples[0]);
  task.sync();
  const set = (name) => (value) => put({ [name]: value });
  return html`${head("Explain", "Say why the model goes on as it does, and prove it: where the answer forms, who writes it, who causes it, and what happens without them.")}
    <form class="wb-form">
      ${examples(facts, said.prompt, fill)}
      <div class="wb-pair">${prompt("Prompt", said.prompt, set("prompt"))}
        ${prompt("Contrast", said.contrast, set("contrast"), { required: false, hint: "as many tokens, another answer; empty: one is searched" })}</div>
      <details class="wb-more" ?open=${Boolean(said.answer || said.wrong)}><summary>Choose the answers yourself</summary>
        <div class="wb-row">
          ${line("Answer", said.answer, set("answer"), { hint: "one token; empty: the model's own" })}
          ${line("Held against", said.wrong, set("wrong"), { hint: "one token; empty: its answer to the contrast" })}
        </div></details>
      ${run("Explain", task, start, !said.prompt)}
    </form>
    ${found()}`;
}

function fill(example) {
  put({ prompt: example?.prompt ?? "", contrast: example?.contrast ?? "", answer: "", wrong: "" }, "explain");
}

function start() {
  const { prompt, contrast, answer, wrong } = of("explain");
  task.start({ do: "explain", model: state.model, prompt, contrast, answer, wrong });
}

function found() {
  const lead = task.newest("lead")?.sentences ?? [];
  const sections = task.named("section");
  if (!sections.length) return nothing;
  return html`<article class="wb-report">
    <div class="uh-lead">${lead.map((sentence) => html`<p>${sentence}</p>`)}</div>
    ${sections.map((s) => html`<section class="uh-section" id="part-${s.id}">
      <h2><span class="uh-no">${s.number}</span><span>${s.title}</span></h2>
      <p class="uh-question">${s.question}</p>
      ${evidence(s)}
    </section>`)}
    ${task.result
      ? html`<p class="wb-kept"><a href="/api/results/${task.result}/report" download>Save the report as a page</a></p>`
      : nothing}
  </article>`;
}
