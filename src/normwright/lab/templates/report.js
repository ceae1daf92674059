const figures = JSON.parse(document.getElementById("figures").textContent);
const narrow = matchMedia("(max-width: 40rem)");
const chosen = {}; // by the plots of a legend: the key brought forward

// Colours in the figures are names of CSS variables, so that the plots follow the theme of the page.
function resolve(value, style, key = "") {
  if (typeof value === "string")
    return /color|fill|stroke/i.test(key) && /^--[a-z0-9-]+$/.test(value) ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => resolve(item, style, key));
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, resolve(item, style, name)]));
  return value;
}

function axis(own = {}) {
  const title = typeof own.title === "string" ? { text: own.title } : own.title;
  return {
    gridcolor: "--grid", linecolor: "--line", zerolinecolor: "--muted", zerolinewidth: 1, zeroline: false,
    tickcolor: "--line", automargin: true, fixedrange: true, exponentformat: "power", minexponent: 4, ...own,
    title: { font: { size: 13 }, standoff: 10, ...title },
  };
}

// On a narrow screen, names of rows stand above their dots, where they leave the plot its width: a row grows by the
// lines of the longest name, and its dots move into what lies below them.
function aboveRows(figure) {
  const { rows, line } = figure.layout.meta ?? {};
  if (!rows || !narrow.matches) return figure;
  const text = 15 * Math.max(...rows.map((row) => row.split("<br>").length)) + 4;
  const share = line / (line + text);
  const moved = (y) => Math.round(y) - 0.5 + share * (y - Math.round(y) + 0.5);
  const annotations = rows.map((row, i) => ({
    text: row, x: 0, xref: "paper", xanchor: "left", y: -i + 0.5, yref: "y", yanchor: "top", showarrow: false,
    font: { size: 12 }, align: "left", bgcolor: "--page",
  }));
  return {
    ...figure,
    traces: figure.traces.map((trace) => ({ ...trace, y: trace.y.map(moved) })),
    layout: {
      ...figure.layout, annotations, height: figure.layout.height + text * rows.length,
      yaxis: { ...figure.layout.yaxis, showticklabels: false, ticks: "", range: [0.5 - rows.length, 0.5] },
    },
  };
}

function layout(own) {
  const axes = Object.fromEntries(
    ["xaxis", "yaxis", ...Object.keys(own).filter((key) => /^[xy]axis\d+$/.test(key))].map((key) => [key, axis(own[key])]),
  );
  return {
    ...own,
    autosize: true, dragmode: false, hovermode: "closest",
    margin: { l: 8, r: 12, t: 10, b: 8, ...own.margin },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 13, color: "--soft-ink" },
    hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--ink", size: 13 } },
    legend: { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top", ...own.legend },
    ...axes,
  };
}

// A chosen line is drawn whole and last; the others step back. Where many lines are drawn, seeds and bands wait for that.
function arranged(figure) {
  const key = chosen[figure.id.replace(/\d+$/, "")];
  if (!figure.traces.some((trace) => trace.meta?.part)) return figure.traces;
  const shown = figure.traces.map((trace) => {
    const mean = trace.meta.part === "mean";
    if (key === undefined) return mean || !figure.crowd ? trace : { ...trace, visible: false };
    if (trace.meta.key === key) return trace;
    return mean ? { ...trace, opacity: 0.18, hoverinfo: "skip", hovertemplate: undefined } : { ...trace, visible: false };
  });
  return key === undefined ? shown : [...shown].sort((a, b) => (a.meta.key === key) - (b.meta.key === key));
}

async function draw(which = figures) {
  const style = getComputedStyle(document.documentElement);
  for (const figure of which.map(aboveRows)) {
    const place = document.getElementById(figure.id);
    const traces = resolve(arranged(figure), style);
    await Plotly.react(place, traces, resolve(layout(figure.layout), style), { displayModeBar: false, responsive: true });
    place.dataset.drawn = "true";
  }
}

function makeLegend(list) {
  const prefix = list.dataset.plots;
  const buttons = [...list.querySelectorAll("button")];
  buttons.forEach((button) => button.addEventListener("click", () => {
    const key = button.dataset.key;
    chosen[prefix] = chosen[prefix] === key ? undefined : key;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other.dataset.key === chosen[prefix])));
    draw(figures.filter((figure) => figure.id.startsWith(prefix)));
  }));
}

// plotly.js lies in the page compressed, which leaves a third of its size.
async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
  const script = document.createElement("script");
  script.textContent = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(script);
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    document.querySelectorAll(".plot").forEach((place) => {
      place.textContent = "This browser is too old for the plots (it lacks DecompressionStream); the tables hold the same numbers.";
      place.style.minHeight = "0";
    });
    return;
  }
  await unpack();
  document.querySelectorAll(".legend").forEach(makeLegend);
  await draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  narrow.addEventListener("change", () => draw());
  // Paper is light: CSS variables of the dark theme hold for the screen alone, so drawing again is enough.
  matchMedia("print").addEventListener("change", async () => {
    await draw();
    figures.forEach((figure) => Plotly.Plots.resize(figure.id));
  });
}

// What is folded away is printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details:not([open])").forEach((details) => {
  details.open = true;
  details.dataset.folded = "true";
}));
addEventListener("afterprint", () => document.querySelectorAll("details[data-folded]").forEach((details) => {
  details.open = false;
  delete details.dataset.folded;
}));
start();
