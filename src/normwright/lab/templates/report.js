"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);

// Colours in the figures are names of CSS variables, so that the plots follow the theme of the page.
function resolve(value, style) {
  if (typeof value === "string") return value.startsWith("--") ? style.getPropertyValue(value).trim() : value;
  if (Array.isArray(value)) return value.map((item) => resolve(item, style));
  if (value !== null && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
  return value;
}

function axis(own) {
  return {
    gridcolor: "--grid", linecolor: "--line", zerolinecolor: "--muted", zerolinewidth: 1, zeroline: false,
    tickcolor: "--line", automargin: true, fixedrange: true, ...own,
    title: { font: { size: 13 }, standoff: 10, ...own.title },
  };
}

function layout(own) {
  return {
    ...own,
    autosize: true, dragmode: false, hovermode: "closest",
    margin: { l: 8, r: 12, t: 10, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif", size: 13, color: "--soft-ink" },
    hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--ink", size: 13 } },
    legend: { orientation: "h", x: 0, xanchor: "left", y: -0.2, yanchor: "top" },
    xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  };
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  return Promise.all(Object.entries(figures).map(([id, figure]) => {
    const place = document.getElementById(id);
    const args = [place, resolve(figure.traces, style), resolve(layout(figure.layout), style), { displayModeBar: false, responsive: true }];
    return Plotly.react(...args).then(() => { place.dataset.drawn = "true"; });
  }));
}

// A table's headers become buttons that sort; without scripts the table stands as it is.
function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const up = header.getAttribute("aria-sort") !== "ascending";
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].textContent.trim();
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => key(a).localeCompare(key(b), "en", { numeric: true }) * (up ? 1 : -1));
      body.append(...rows);
    });
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
// Paper is light: CSS variables of the dark theme hold for the screen alone, so drawing again is enough.
matchMedia("print").addEventListener("change", () => draw().then(() => Object.keys(figures).forEach((id) => Plotly.Plots.resize(id))));
