"use strict";
for (const box of document.querySelectorAll(".search")) {
  const table = document.getElementById(box.dataset.table);
  const rows = [...table.tBodies[0].rows];
  const texts = rows.map((row) => row.textContent.toLowerCase().replaceAll("\u00a0", " "));
  const input = box.querySelector("input");
  const status = box.querySelector("[role=status]");
  const filter = () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, number) => {
      row.hidden = !words.every((word) => texts[number].includes(word));
      shown += !row.hidden;
    });
    status.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };
  input.addEventListener("input", filter);
  box.hidden = false;
}
for (const heading of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...heading.childNodes);
  heading.append(button);
  button.addEventListener("click", () => {
    const body = heading.closest("table").tBodies[0];
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[heading.cellIndex].dataset.value ?? row.cells[heading.cellIndex].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      const difference = Number(x) - Number(y);
      return x !== "" && y !== "" && !Number.isNaN(difference) ? difference : x.localeCompare(y);
    };
    const rows = [...body.rows].sort(order);
    body.append(...(descending ? rows.reverse() : rows));
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
  });
}
