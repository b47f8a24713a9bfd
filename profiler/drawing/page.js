"use strict";
// Unpacks the library, draws every figure in the colours of the page and for its width, and again when these change.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 40rem)");
  const touch = window.matchMedia("(pointer: coarse)");
  const config = { displayModeBar: false, displaylogo: false, responsive: true };
  const [TICK_PX, GAP_PX] = [44, 2]; // between two ticks; between two labels

  async function unpackLibrary() {
    const packed = atob(document.getElementById("library").textContent);
    const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  // On a narrow screen an axis has only ticks that do not touch, the workload's among them.
  function forWidth(figure, width) {
    const layout = structuredClone(figure.layout);
    if (!narrow.matches) return layout;
    const axis = layout.xaxis;
    if (axis.tickmode === "array" && axis.range) {
      const own = layout.meta?.own ?? axis.tickvals[0];
      const [low, high] = axis.range;
      const at = (value) => ((Math.log10(value) - low) / (high - low)) * (width - 80);
      const kept = new Set([own]);
      for (const side of [axis.tickvals.filter((one) => one > own), axis.tickvals.filter((one) => one < own).reverse()]) {
        let last = own;
        for (const value of side) {
          if (Math.abs(at(value) - at(last)) >= TICK_PX) kept.add((last = value));
        }
      }
      const shown = axis.tickvals.map((value, idx) => idx).filter((idx) => kept.has(axis.tickvals[idx]));
      axis.ticktext = shown.map((idx) => axis.ticktext[idx]);
      axis.tickvals = shown.map((idx) => axis.tickvals[idx]);
    }
    return layout;
  }

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

  // Labels of dots that would overlap another label, a dot of another or the edge are not shown: the table has them.
  function unclutter(chart) {
    const grown = (box, by) => [box.left - by, box.top - by, box.right + by, box.bottom + by];
    const touches = (one, other) => one[0] < other[2] && other[0] < one[2] && one[1] < other[3] && other[1] < one[3];
    const edge = chart.getBoundingClientRect();
    const taken = [...chart.querySelectorAll(".points .point")].map((one) => grown(one.getBoundingClientRect(), -GAP_PX));
    for (const label of chart.querySelectorAll(".textpoint text")) {
      const box = label.getBoundingClientRect();
      const isOutside = box.right > edge.right || box.left < edge.left || box.bottom > edge.bottom;
      const isShown = !isOutside && !taken.some((other) => touches(grown(box, 0), other));
      label.style.visibility = isShown ? "visible" : "hidden";
      if (isShown) taken.push(grown(box, GAP_PX));
    }
  }

  async function draw() {
    for (const [name, figure] of Object.entries(figures)) {
      const chart = document.getElementById(name);
      const layout = inPageColours(forWidth(figure, chart.clientWidth));
      await Plotly.react(chart, figure.data, layout, config);
      if (!chart.dataset.watched) {
        chart.dataset.watched = "true";
        chart.on("plotly_afterplot", () => unclutter(chart));
      }
      unclutter(chart);
    }
    document.body.dataset.drawn = String(Object.keys(figures).length);
  }

  async function begin() {
    if (typeof DecompressionStream === "undefined") {
      document.getElementById("old-browser").hidden = false;
      return;
    }
    await unpackLibrary();
    dark.addEventListener("change", draw);
    narrow.addEventListener("change", draw);
    await draw();
  }
  begin();
})();
