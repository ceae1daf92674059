"use strict";
// A table's headers become buttons that sort; without scripts the table stands as it is.
// Numbers sort as numbers (also with a true minus), before text; empty cells stay last either way.
function sortKey(cell) {
  const text = (cell?.dataset.value ?? cell?.textContent ?? "").trim();
  if (text === "" || text === "–") return null;
  const plain = text.replaceAll("−", "-").replaceAll(",", "");
  const number = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*%?$/i.test(plain) ? parseFloat(plain) : NaN;
  return Number.isNaN(number) ? text : number;
}

function compare(a, b, up) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
  return up ? order : -order;
}

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
      const body = table.tBodies[0];
      const keyed = [...body.rows].map((row) => [sortKey(row.cells[column]), row]);
      body.append(...keyed.sort((a, b) => compare(a[0], b[0], up)).map(([, row]) => row));
    });
  });
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
