"use strict";
// Draws every figure in the colours of the page, and again when these change.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");
  const touch = window.matchMedia("(pointer: coarse)");
  const config = { displayModeBar: false, displaylogo: false, responsive: true };

  function inPageColours(layout) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: colour("--line"), linecolor: colour("--quiet"), zerolinecolor: colour("--line") };
    const themed = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--text"), size: 13, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: { bgcolor: colour("--panel"), bordercolor: colour("--quiet"), font: { color: colour("--text") } },
      dragmode: touch.matches ? false : "zoom", // a finger scrolls the page
    };
    for (const name of Object.keys(layout)) {
      if (/^[xy]axis/.test(name)) themed[name] = { ...axis, showline: true, ...layout[name] };
    }
    return themed;
  }

  async function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      const chart = document.getElementById(name);
      const legend = figure.data.filter((trace) => trace.showlegend !== false).length;
      const extra = narrow.matches ? 19 * legend : 0; // there every entry has a line of its own
      chart.style.height = `${Number(chart.dataset.height) + extra}px`;
      await Plotly.react(chart, figure.data, inPageColours(figure.layout), config);
    }
    document.body.dataset.drawn = String(Object.keys(figures).length);
  }

  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
})();
