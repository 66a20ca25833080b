"use strict";
(() => {
  const root = document.documentElement;
  const plots = [...document.querySelectorAll(".plot")];
  const tabs = [...document.querySelectorAll("#tabs a")];
  const panels = tabs.map((tab) => document.querySelector(tab.hash));
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const PAPER_WIDTH = 680; // CSS pixels: A4 and Letter alike, less the margins
  root.classList.add("scripted");

  // --- tabs: the ARIA pattern, with arrow keys; the address says which is open ---

  document.getElementById("tabs").setAttribute("role", "tablist");
  tabs.forEach((tab, index) => {
    tab.setAttribute("role", "tab");
    tab.setAttribute("aria-controls", panels[index].id);
    panels[index].setAttribute("role", "tabpanel");
    panels[index].tabIndex = 0;
    tab.addEventListener("click", (event) => {
      event.preventDefault();
      open(index);
      history.replaceState(null, "", tab.hash);
    });
    tab.addEventListener("keydown", (event) => {
      const last = tabs.length - 1;
      const next = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last }[event.key];
      if (next === undefined && event.key !== " ") return;
      event.preventDefault();
      const chosen = tabs[next === undefined ? index : (next + tabs.length) % tabs.length];
      chosen.focus();
      chosen.click();
    });
  });

  function open(index) {
    tabs.forEach((tab, other) => {
      tab.setAttribute("aria-selected", String(other === index));
      tab.tabIndex = other === index ? 0 : -1;
      panels[other].hidden = other !== index;
    });
    fit(panels[index]); // the window may have another width since its plots were drawn
  }

  function fit(panel) {
    panel.querySelectorAll(".plot[data-drawn]").forEach((plot) => Plotly.Plots.resize(plot));
  }

  function openAddress() {
    open(Math.max(0, tabs.findIndex((tab) => tab.hash === location.hash)));
  }
  openAddress();
  addEventListener("hashchange", openAddress);

  // --- plots: drawn as they come into view, in the colours of the page ---

  function draw(plot, width) {
    const style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const { data, layout } = structuredClone(figures[plot.dataset.figure]);
    for (const trace of data) {
      if (!trace.meta) continue;
      const own = colour(trace.meta.colour);
      trace.marker = { ...trace.marker, color: own, line: { ...trace.marker?.line, color: own } };
      if (trace.type === "scatter") trace.line = { ...trace.line, color: own };
      if (trace.type === "bar") {
        trace.marker.pattern = { ...trace.marker.pattern, fgcolor: colour("page") };
        trace.insidetextfont = { color: colour("page") };
        trace.outsidetextfont = { color: colour("text") };
      }
      if (trace.error_x) trace.error_x.color = trace.type === "bar" ? colour("text") : own;
      trace.hoverlabel = { bordercolor: own };
    }
    const axis = { gridcolor: colour("grid"), zerolinecolor: colour("rule"), linecolor: colour("rule") };
    layout.template = {
      layout: {
        font: { color: colour("text"), size: 12, family: style.fontFamily },
        paper_bgcolor: colour("page"),
        plot_bgcolor: colour("page"),
        hoverlabel: {
          bgcolor: colour("page"),
          font: { color: colour("text"), family: style.fontFamily },
          namelength: -1,
          align: "left",
        },
        shapedefaults: { line: { color: colour("faint") } },
        xaxis: axis,
        yaxis: axis,
      },
    };
    const finger = matchMedia("(pointer: coarse)").matches;
    if (finger) layout.dragmode = false; // it scrolls the page
    if (width) layout.width = width;
    plot.dataset.drawn = "";
    return Plotly.react(plot, data, layout, {
      responsive: true,
      displaylogo: false,
      displayModeBar: finger ? false : "hover",
      modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
    });
  }

  const inView = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries) {
        if (isIntersecting && !("drawn" in target.dataset)) draw(target);
      }
    },
    { rootMargin: "400px" },
  );
  plots.forEach((plot) => inView.observe(plot));

  const redraw = () => plots.filter((plot) => "drawn" in plot.dataset).map((plot) => draw(plot));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

  // --- paper: every panel, every plot, in light colours ---

  function print(begins) {
    if (root.classList.contains("printing") === begins) return;
    root.classList.toggle("printing", begins);
    if (begins) plots.forEach((plot) => draw(plot, PAPER_WIDTH));
    else Promise.all(redraw()).then(() => panels.filter((panel) => !panel.hidden).forEach(fit));
  }
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("print").addEventListener("change", (event) => print(event.matches));
})();
