// Brings the figures of rkd.interactive to life. Every control names a signal; all charts and numbers of the page
// that know a signal of that name follow it.
"use strict";

(() => {
  const root = document.documentElement;
  const figures = [...document.querySelectorAll(".rkd-interactive")];
  const controls = [...document.querySelectorAll(".rkd-live input, .rkd-live select")];
  const numbers = [...document.querySelectorAll(".rkd-live [data-signal]:not(input):not(select)")];
  const views = [];
  const known = new Map(); // the signals of each view, by name

  const knows = (view, signal) => known.get(view).has(signal);
  const value = (signal) => {
    const view = views.find((view) => knows(view, signal));
    return view ? view.signal(signal) : undefined;
  };
  const valueOf = (control) => (control.type === "range" ? Number(control.value) : control.value);
  const isDark = () => root.dataset.theme === "dark";

  function show() {
    for (const element of numbers) {
      const found = value(element.dataset.signal);
      element.textContent = element.dataset.index ? found[Number(element.dataset.index)] : found;
    }
    for (const control of controls) {
      if (control.dataset.text) control.setAttribute("aria-valuetext", value(control.dataset.text));
    }
  }

  function set(values) {
    for (const control of controls) {
      if (control.dataset.signal in values) control.value = values[control.dataset.signal];
    }
    for (const view of views) {
      for (const [signal, wanted] of Object.entries(values)) {
        if (knows(view, signal)) view.signal(signal, wanted);
      }
      view.run();
    }
    show();
  }

  const tip = document.createElement("div");
  tip.className = "rkd-tip";
  tip.hidden = true;

  function tooltip(_, event, __, text) {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const room = root.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 12, room))}px`;
    tip.style.top = `${event.clientY + 16}px`;
  }

  async function start(chart) {
    const specification = JSON.parse(chart.querySelector("script").textContent);
    const place = chart.appendChild(document.createElement("div"));
    place.setAttribute("aria-hidden", "true"); // its parent says what it shows, and the numbers are below
    const options = { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, tooltip };
    const { view } = await vegaEmbed(place, specification, options);
    known.set(view, new Set(specification.signals.map((signal) => signal.name)));
    chart.view = view;
    views.push(view);
  }

  async function startAll() {
    document.body.append(tip);
    for (const figure of figures) {
      figure.querySelector(".rkd-live").hidden = false;
      figure.querySelector(".rkd-still").hidden = true;
    }
    await Promise.all([...document.querySelectorAll(".rkd-chart")].map(start));
    for (const control of controls) {
      control.addEventListener("input", () => set({ [control.dataset.signal]: valueOf(control) }));
    }
    for (const button of document.querySelectorAll(".rkd-presets button")) {
      button.addEventListener("click", () => set(JSON.parse(button.dataset.set)));
    }
    // a browser may bring back what the reader had set before a reload
    const now = controls.map((control) => [control.dataset.signal, valueOf(control)]);
    set({ ...Object.fromEntries(now), dark: isDark() });
    new MutationObserver(() => set({ dark: isDark() })).observe(root, { attributeFilter: ["data-theme"] });
    root.dataset.interactive = "ready";
  }

  startAll();
})();
