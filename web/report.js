/** What pages and notebook cells inline: the first copy on a page defines, each copy upgrades. */
import * as underhood from "./index.js";

globalThis.underhood1 ??= underhood;
globalThis.underhood1.define();
globalThis.underhood1.upgrade(document);

/** Open what is folded around the place that the address names, and go there. */
function arrive() {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  // Elements are not as tall as the drawings they replace.
  requestAnimationFrame(() => (target.closest("details.uh-fold") ?? target).scrollIntoView());
}

// Only in a page of our own: a notebook has its own anchors.
if (document.body.classList.contains("uh-page")) {
  arrive();
  addEventListener("hashchange", arrive);
}
