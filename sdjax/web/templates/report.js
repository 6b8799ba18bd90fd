// The script of report.html: draws the curves when they come into view, and turns the galleries.
"use strict";
(() => {
  const [steps, images] = JSON.parse(document.getElementById("content").dataset.seen);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const COLOURS = {
    light: ["#0b62c4", "#c2410c", "#15803d", "#a21caf", "#0e7490", "#8a5a00", "#be123c", "#4d7c0f",
            "#6d28d9", "#475569"],
    dark: ["#7ab8ff", "#ffa26b", "#6fdc8c", "#f0a6ff", "#5fd7e8", "#ffd166", "#ff8fa3", "#b5e15a",
           "#b9a2ff", "#b6c2d1"],
  };
  const DASHES = ["solid", "dot", "dash", "dashdot"];  // once the colours are used up
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "star"];
  const state = { axis: "step", smooth: true };
  const theme = () => (dark.matches ? "dark" : "light");
  const colour = (i) => COLOURS[theme()][i % COLOURS.light.length];
  const dash = (i) => DASHES[Math.floor(i / COLOURS.light.length) % DASHES.length];
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const decode = (packed) => {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    return Array.from(packed.type === "f8" ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer));
  };

  // Images seen at a step, between the steps that are known, and beyond them at the last rate.
  const imagesAt = (step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    const part = (step - steps[low]) / (steps[high] - steps[low]);
    return images[low] + part * (images[high] - images[low]);
  };

  const figures = [...document.querySelectorAll(".plot-card")].map((card) => {
    const spec = JSON.parse(card.dataset.figure);
    return { spec, card, hidden: new Set(), drawn: false, series: null, log: spec.log };
  });

  const unpack = (figure) => {
    figure.series ??= figure.spec.series.map((s) => ({
      name: s.name, x: decode(s.x), y: decode(s.y),
      low: s.low && decode(s.low), high: s.high && decode(s.high),
      sx: s.sx && decode(s.sx), sy: s.sy && decode(s.sy),
    }));
    return figure.series;
  };

  const along = (figure, xs) =>
    figure.spec.over === "step" && state.axis === "images" ? xs.map(imagesAt) : xs;

  const line = (figure, s, i, extra) => ({
    type: "scatter", mode: "lines", name: s.name, x: along(figure, s.x), y: s.y,
    line: { color: colour(i), dash: dash(i), width: 2 }, hovertemplate: "%{y:.4~g}", ...extra,
  });

  const band = (figure, s, i) => [
    line(figure, { ...s, y: s.low }, i, { line: { width: 0 }, hoverinfo: "skip", hovertemplate: null }),
    line(figure, { ...s, y: s.high }, i, {
      line: { width: 0 }, fill: "tonexty", fillcolor: colour(i) + "33", hoverinfo: "skip", hovertemplate: null,
    }),
  ];

  const dots = (figure, s, i) => {
    const trace = line(figure, s, i, {
      mode: s.y.length > 1 ? "lines+markers" : "markers", line: { color: colour(i), width: 1, dash: "dot" },
      marker: { color: colour(i), size: 9, symbol: SYMBOLS[i % SYMBOLS.length] },
    });
    if (s.low) {
      trace.error_y = {
        type: "data", symmetric: false, color: colour(i), thickness: 1.5, width: 5,
        array: s.y.map((y, k) => s.high[k] - y), arrayminus: s.y.map((y, k) => y - s.low[k]),
      };
    }
    return trace;
  };

  const traces = (figure) => {
    const series = unpack(figure);
    const few = series.length <= 4;
    return series.flatMap((s, i) => {
      if (figure.hidden.has(i)) return [];
      if (figure.spec.mode === "markers") return [dots(figure, s, i)];
      if (state.smooth && s.sx) {
        const front = line(figure, { name: s.name, x: s.sx, y: s.sy }, i, {});
        const behind = line(figure, s, i, { opacity: 0.3, line: { color: colour(i), width: 1 } });
        behind.hoverinfo = "skip";
        behind.hovertemplate = null;
        return few ? [behind, front] : [front];
      }
      if (s.y.length === 1) return [dots(figure, s, i)];
      const sparse = figure.spec.over === "step" ? {} : { mode: "lines+markers", connectgaps: true };
      return [...(s.low ? band(figure, s, i) : []), line(figure, s, i, sparse)];
    });
  };

  // A curve that never changes lies in the middle, with an axis of its own size.
  const flat = (figure) => {
    const shown = unpack(figure).flatMap((s) => [s.y, s.low ?? [], s.high ?? []].flat()).filter(Number.isFinite);
    const low = shown.reduce((a, b) => Math.min(a, b), Infinity), high = shown.reduce((a, b) => Math.max(a, b), -Infinity);
    if (figure.log || high - low > 1e-6 * Math.abs(high)) return {};
    return { range: high === 0 ? [-0.1, 1] : [high - Math.abs(high) / 10, high + Math.abs(high) / 10] };
  };

  const layout = (figure) => {
    const axis = {
      gridcolor: variable("--line"), linecolor: variable("--line"), zeroline: false, automargin: true,
      tickfont: { size: 11 },
    };
    const label = figure.spec.over !== "step" ? figure.spec.over : state.axis === "images" ? "images seen" : "step";
    return {
      autosize: true, showlegend: false, margin: { l: 48, r: 12, t: coarse ? 36 : 14, b: 40 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: variable("--ink"), family: getComputedStyle(document.body).fontFamily, size: 12 },
      xaxis: { ...axis, title: { text: label, standoff: 6 }, type: figure.spec.logX ? "log" : "linear" },
      yaxis: {
        ...axis, title: { text: figure.spec.unit, standoff: 6 }, type: figure.log ? "log" : "linear",
        exponentformat: "e", ...flat(figure),
      },
      hovermode: figure.spec.series.length <= 8 ? "x unified" : "closest",
      hoverlabel: { bgcolor: variable("--card"), font: { color: variable("--ink") }, namelength: -1 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--soft"), activecolor: variable("--accent") },
      dragmode: coarse ? false : "zoom",  // a finger on a plot scrolls the page
      uirevision: state.axis + figure.log,  // as long as the axes stay what they are, so does the zoom
    };
  };

  const CONFIG = {
    responsive: true, displaylogo: false, displayModeBar: coarse ? true : "hover", doubleClick: "reset+autosize",
    // Written out: Plotly's own choice has a button that uploads the chart.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]], showTips: false,
  };

  const draw = (figure) => {
    figure.drawn = true;
    Plotly.react(figure.card.querySelector(".plot"), traces(figure), layout(figure), CONFIG);
    paintLegend(figure);
  };
  const redraw = () => figures.filter((f) => f.drawn).forEach(draw);

  const paintLegend = (figure) => {
    figure.card.querySelectorAll(".legend line").forEach((stroke, i) => {
      stroke.setAttribute("stroke", colour(i));
      stroke.setAttribute("stroke-dasharray", { solid: "none", dot: "2 3", dash: "6 3", dashdot: "6 3 2 3" }[dash(i)]);
    });
  };

  figures.forEach((figure) => {
    figure.card.querySelectorAll(".legend button").forEach((button, i) => {
      button.addEventListener("click", () => {
        const shown = figure.hidden.delete(i) || (figure.hidden.add(i), false);
        button.setAttribute("aria-pressed", String(shown));
        draw(figure);
      });
    });
    const log = figure.card.querySelector(".log");
    log?.addEventListener("click", () => {
      figure.log = !figure.log;
      log.setAttribute("aria-pressed", String(figure.log));
      draw(figure);
    });
  });

  const byPlot = new Map(figures.map((f) => [f.card.querySelector(".plot"), f]));
  const watcher = new IntersectionObserver((entries) => {
    entries.filter((e) => e.isIntersecting).forEach((e) => {
      watcher.unobserve(e.target);
      draw(byPlot.get(e.target));
    });
  }, { rootMargin: "500px" });
  byPlot.forEach((_, plot) => watcher.observe(plot));
  addEventListener("beforeprint", () => figures.filter((f) => !f.drawn).forEach(draw));
  dark.addEventListener("change", redraw);

  document.querySelectorAll("input[name=axis]").forEach((input) => {
    input.addEventListener("change", () => { state.axis = input.value; redraw(); });
  });
  document.getElementById("smooth")?.addEventListener("change", (event) => {
    state.smooth = event.target.checked;
    redraw();
  });

  document.querySelectorAll(".gallery").forEach((gallery) => {
    const slider = gallery.querySelector("input[type=range]");
    const pictures = [...gallery.querySelectorAll("figure")];
    const show = (index) => {
      const at = Math.max(0, Math.min(pictures.length - 1, index));
      slider.value = at;
      pictures.forEach((picture, i) => { picture.hidden = i !== at; });
      const step = pictures[at].dataset.step;
      slider.setAttribute("aria-valuetext", "step " + step);
      gallery.querySelector(".which").textContent = "step " + step;
    };
    slider.addEventListener("input", () => show(Number(slider.value)));
    gallery.querySelector(".earlier").addEventListener("click", () => show(Number(slider.value) - 1));
    gallery.querySelector(".later").addEventListener("click", () => show(Number(slider.value) + 1));
    show(pictures.length - 1);
  });
  document.querySelectorAll("button.copy").forEach((button) => {
    button.addEventListener("click", () => {
      const text = document.getElementById(button.dataset.of).textContent;
      const done = () => { button.textContent = "Copied"; };
      navigator.clipboard?.writeText(text).then(done, () => { button.textContent = "Select and copy by hand"; });
    });
  });
})();
