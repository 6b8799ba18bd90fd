// The figures of the report and of the page that watches, as Plotly draws them.
"use strict";
const Figures = (() => {
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
  // imagesAt(step, series): images seen by then, for the axis "images".
  const state = { axis: "step", smooth: true, imagesAt: null };
  const theme = () => (dark.matches ? "dark" : "light");
  // A series may name its colour and dash, as where one colour is one run.
  const colour = (s, i) => COLOURS[theme()][(s.tint ?? i) % COLOURS.light.length];
  const dash = (s, i) => DASHES[(s.dashes ?? Math.floor(i / COLOURS.light.length)) % DASHES.length];
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const decode = (packed) => {
    const bytes = Uint8Array.from(atob(packed.data), (c) => c.charCodeAt(0));
    return Array.from(packed.type === "f8" ? new Float64Array(bytes.buffer) : new Float32Array(bytes.buffer));
  };

  const unpack = (figure) => {
    figure.series ??= figure.spec.series.map((s) => ({
      name: s.name, x: decode(s.x), y: decode(s.y),
      low: s.low && decode(s.low), high: s.high && decode(s.high),
      sx: s.sx && decode(s.sx), sy: s.sy && decode(s.sy),
    }));
    return figure.series;
  };

  const along = (figure, s) =>
    figure.spec.over === "step" && state.axis === "images" ? s.x.map((step) => state.imagesAt(step, s)) : s.x;

  const line = (figure, s, i, extra) => ({
    type: "scatter", mode: "lines", name: s.name, x: along(figure, s), y: s.y,
    line: { color: colour(s, i), dash: dash(s, i), width: 2 }, hovertemplate: "%{y:.4~g}", ...extra,
  });

  const band = (figure, s, i) => [
    line(figure, { ...s, y: s.low }, i, { line: { width: 0 }, hoverinfo: "skip", hovertemplate: null }),
    line(figure, { ...s, y: s.high }, i, {
      line: { width: 0 }, fill: "tonexty", fillcolor: colour(s, i) + "33", hoverinfo: "skip", hovertemplate: null,
    }),
  ];

  const dots = (figure, s, i) => {
    const trace = line(figure, s, i, {
      mode: s.y.length > 1 ? "lines+markers" : "markers", line: { color: colour(s, i), width: 1, dash: "dot" },
      marker: { color: colour(s, i), size: 9, symbol: SYMBOLS[i % SYMBOLS.length] },
    });
    if (s.low) {
      trace.error_y = {
        type: "data", symmetric: false, color: colour(s, i), thickness: 1.5, width: 5,
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
        const front = line(figure, { ...s, x: s.sx, y: s.sy }, i, {});
        const behind = line(figure, s, i, { opacity: 0.3, line: { color: colour(s, i), width: 1 } });
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

  const paintLegend = (figure) => {
    figure.card.querySelectorAll(".legend line").forEach((stroke, i) => {
      const s = unpack(figure)[i];
      stroke.setAttribute("stroke", colour(s, i));
      stroke.setAttribute("stroke-dasharray", { solid: "none", dot: "2 3", dash: "6 3", dashdot: "6 3 2 3" }[dash(s, i)]);
    });
  };

  // The buttons of a legend and of the axis; a figure whose legend is made anew is listened to anew.
  const listen = (figure) => {
    figure.card.querySelectorAll(".legend button").forEach((button, i) => {
      button.addEventListener("click", () => {
        const shown = figure.hidden.delete(i) || (figure.hidden.add(i), false);
        button.setAttribute("aria-pressed", String(shown));
        draw(figure);
      });
    });
  };
  const listenToLog = (figure) => {
    const log = figure.card.querySelector(".log");
    log?.addEventListener("click", () => {
      figure.log = !figure.log;
      log.setAttribute("aria-pressed", String(figure.log));
      draw(figure);
    });
  };

  return { state, dark, decode, colour, draw, listen, listenToLog };
})();
