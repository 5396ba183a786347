"use strict";
// Sorts the table of runs by a column: by the last number of each cell ("0.1 → 0.5"), else by text.
for (const table of document.querySelectorAll("#runs table")) {
  const heads = [...table.tHead.rows[0].cells];
  const worth = (row, at) => {
    const text = row.cells[at].textContent;
    const value = text.replace(/ at step .*/, "").match(/-?\d+(\.\d+)?(e[+-]?\d+)?(?=[^\d]*$)/);
    return { text, value: at > 0 && value ? Number(value[0]) : null };
  };
  const compare = (a, b) => {
    if (a.value !== null && b.value !== null) return a.value - b.value;
    if (a.value !== null || b.value !== null) return a.value === null ? 1 : -1;
    return a.text.localeCompare(b.text, undefined, { numeric: true });
  };
  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => compare(worth(a, at), worth(b, at)));
      table.tBodies[0].append(...(down ? rows.reverse() : rows));
    });
  });
}
