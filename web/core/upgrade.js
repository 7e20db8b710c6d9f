/** Static views of a page become elements. Nothing is lost where the script does not run. */
import { element, tagOf } from "./element.js";

/**
 * Replace each drawn view that carries its document (`script.uh-doc`) by its element; views in
 * something folded wait until it is opened.
 * @param {Document | Element} root where to look
 */
export function upgrade(root = document) {
  const told = read(document.querySelector("script.uh-told")) ?? {};
  for (const script of /** @type {NodeListOf<HTMLScriptElement>} */ (root.querySelectorAll(".uh-view > script.uh-doc"))) {
    const drawn = script.parentElement;
    const fold = drawn.parentElement.closest("details:not([open])");
    if (fold) {
      fold.addEventListener("toggle", () => upgrade(fold), { once: true });
      continue;
    }
    const view = read(script);
    // A kind of a newer version stays as Python drew it.
    if (!view || !customElements.get(tagOf(view.kind))) continue;
    const made = element(view, { level: Number(script.dataset.level), told });
    made.source = script.textContent;
    made.fallback = drawn;
    drawn.replaceWith(made);
  }
}

function read(script) {
  try {
    return script && JSON.parse(script.textContent);
  } catch {
    return null; // cut short on its way: the static picture is still there
  }
}
