// Shows where a link leads while the pointer or the focus is on it; Escape closes it, a tap follows the link.
const hideOnEscape = {
  name: "hideOnEscape",
  defaultValue: true,
  fn: ({ hide }) => {
    const onKeyDown = (event) => event.key === "Escape" && hide();
    return {
      onShow: () => document.addEventListener("keydown", onKeyDown),
      onHide: () => document.removeEventListener("keydown", onKeyDown),
    };
  },
};

// not before it is shown: pictures of a preview would load with the page
function fill(instance, content) {
  if (instance.props.content) return;
  instance.setContent(content);
  const place = () => instance.popperInstance?.update();
  for (const picture of instance.popper.querySelectorAll("img")) picture.addEventListener("load", place);
  if (!instance.popper.querySelector(".math")) return;
  MathJax.startup.promise.then(() => MathJax.typesetPromise([instance.popper])).then(place);
}

for (const link of document.querySelectorAll('article.bd-article a.reference.internal[href*="#"]')) {
  const content = window.previews[link.getAttribute("href")];
  // a page without formulas of its own has not loaded what would draw those of a preview
  if (!content || (content.includes('class="math') && !window.MathJax)) continue;
  link.removeAttribute("title");
  tippy(link, {
    content: "",
    allowHTML: true,
    interactive: true, // the pointer may move onto it, to scroll or to select
    appendTo: () => document.body,
    aria: { content: "describedby", expanded: false },
    delay: [250, 80],
    duration: matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : [150, 100],
    maxWidth: "min(40rem, 92vw)",
    placement: "top",
    touch: ["hold", 400],
    theme: "book",
    plugins: [hideOnEscape],
    onShow: (instance) => fill(instance, content),
  });
}
