"use strict";
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const text = document.getElementById(button.dataset.copy);
    const range = document.createRange();
    range.selectNodeContents(text);
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    const done = () => { button.textContent = "copied"; setTimeout(() => { button.textContent = "copy"; }, 1500); };
    if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, () => {});
    else if (document.execCommand("copy")) done();
  });
}
const table = document.getElementById("modules");
if (table) {
  const body = table.tBodies[0], rows = [...body.rows];
  const text = document.getElementById("find"), role = document.getElementById("role"), odd = document.getElementById("odd");
  const shown = document.getElementById("shown");
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const content = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => content.includes(word)) && (!role.value || row.dataset.role === role.value)
        && (!odd.checked || row.dataset.agrees === "no"));
      count += !row.hidden;
    }
    shown.textContent = `${count} of ${rows.length} shown`;
  };
  for (const control of [text, role, odd]) control.addEventListener("input", filter);
  const key = (row, index) => row.cells[index].dataset.value ?? row.cells[index].textContent;
  for (const head of table.tHead.rows[0].cells) {
    const sort = () => {
      const down = head.getAttribute("aria-sort") === "ascending", index = head.cellIndex;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numbers = head.dataset.sort === "number";
      rows.sort((a, b) => (numbers ? key(a, index) - key(b, index)
        : key(a, index).localeCompare(key(b, index), "en", { numeric: true })) * (down ? -1 : 1));
      body.append(...rows);
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); } });
  }
}
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details:not(.long)")) part.open = true; });
