// What scrolls sideways can be scrolled from the keyboard: it is a stop of the Tab key, and says what it is.
// The theme makes it one, too, but knows neither formulas nor folds, and gives it no name.
(() => {
  const KINDS = {
    "pre": "Code",
    "div.math, mjx-container[display]": "Formula",
    ".pst-scrollable-table-container": "Table",
    ".cell_output > .output": "Output",
  };

  function mark(box, kind) {
    const scrolls = box.scrollWidth > box.clientWidth + 1 && getComputedStyle(box).overflowX !== "visible";
    if (scrolls) {
      box.tabIndex = 0;
      box.setAttribute("role", "group");
      box.setAttribute("aria-label", `${kind}, wider than the page`);
    } else if (box.getAttribute("role") === "group") {
      for (const name of ["tabindex", "role", "aria-label"]) box.removeAttribute(name);
    }
  }

  function markAll() {
    for (const [selector, kind] of Object.entries(KINDS))
      document.querySelectorAll(`.bd-article :is(${selector})`).forEach((box) => mark(box, kind));
  }

  // The theme takes the focus from its buttons when they are pressed, and who uses the keyboard would be lost.
  function keepFocus() {
    const buttons = ".theme-switch-button, .search-button, .primary-toggle, .secondary-toggle";
    for (const button of document.querySelectorAll(buttons)) button.blur = () => {};
  }

  // Sphinx has no summary of a result without text, and its search stumbles over that.
  addEventListener("DOMContentLoaded", () => {
    if (typeof Search === "undefined") return;
    const summary = Search.makeSearchSummary;
    Search.makeSearchSummary = (...given) => summary.apply(Search, given) ?? document.createTextNode("");
  });

  let waiting;
  addEventListener("load", () => {
    keepFocus();
    markAll();
    window.MathJax?.startup?.promise?.then(markAll);
  });
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(markAll, 100);
  });
  document.addEventListener("toggle", markAll, true); // hidden code is opened
})();
