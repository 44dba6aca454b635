
"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const filter = document.getElementById("filter");
  const map = document.getElementById("map");
  const readout = document.getElementById("readout");

  // Open every fold around what a link leads to.
  const reveal = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let each = target; each; each = each.parentElement) if (each.localName === "details") each.open = true;
    target?.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  // The filter: every word must be in what a line says.
  const lines = all(".report, .cases tr, .groups tbody tr").map((line) => {
    const said = line.matches(".report") ? line.firstElementChild.textContent : line.textContent;
    return [line, `${said} ${line.dataset.find ?? ""}`.toLowerCase()];
  });
  const cells = map ? all("td a", map).map((link) => [link.parentElement, link.title.toLowerCase()]) : [];
  const apply = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    const wanted = (said) => words.every((word) => said.includes(word));
    for (const [line, said] of lines) line.hidden = !wanted(said);
    for (const [cell, said] of cells) cell.classList.toggle("off", !wanted(said));
  };
  filter.addEventListener("input", apply);
  filter.hidden = false;
  document.querySelector("footer").hidden = false;

  // One stop for Tab in the map; arrows move within it.
  const rove = (link) => {
    for (const each of all("td a", map)) each.tabIndex = each === link ? 0 : -1;
  };
  const beside = (cell, dx, dy) => {
    for (let row = cell.parentElement.rowIndex + dy, at = cell.cellIndex + dx; ; row += dy, at += dx) {
      const next = map.rows[row]?.cells[at];
      if (!next) return null;
      const link = next.localName === "td" && next.querySelector("a");
      if (link) return link;
    }
  };
  if (map) {
    rove(map.querySelector("td a"));
    readout.hidden = false;
    for (const kind of ["focusin", "mouseover"]) {
      map.addEventListener(kind, ({ target }) => {
        const link = target.closest("td")?.querySelector("a");
        if (link) readout.textContent = link.title;
        if (link && kind === "focusin") rove(link);
      });
    }
  }

  const arrows = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
  addEventListener("keydown", (event) => {
    const at = document.activeElement;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    let next;
    if (event.key === "/" && at !== filter) next = filter;
    else if (event.key === "Escape" && at === filter) {
      filter.value = "";
      apply();
    } else if (event.key in arrows && map?.contains(at)) next = beside(at.closest("td"), ...arrows[event.key]);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const stops = all(".report:not([hidden]) > summary");
      const here = stops.indexOf(at);
      if (at === filter && event.key === "ArrowDown") next = stops[0];
      else if (here >= 0) next = stops[here + (event.key === "ArrowDown" ? 1 : -1)];
    }
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
})();
