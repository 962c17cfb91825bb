"use strict";
// The list of studies, its filters, and the one card that is shown.
(() => {
  const legend = document.getElementById("legend");
  for (const [kind, about] of Object.entries(KINDS)) legend.append(make("dt", {}, badge(kind)), make("dd", {}, about.means));
  if (!DATA.sets.length) return;
  const search = document.getElementById("search"), observation = document.getElementById("observation"), order = document.getElementById("order");
  const list = document.getElementById("list"), shownCard = document.getElementById("card"), kindsBox = document.getElementById("kinds");
  const LISTED_AT_ONCE = 200;
  const state = { set: 0, listed: 0, found: [], current: null, think: false };
  const chosen = new Map(); // card -> {at, member}, so that coming back shows what was chosen
  const last = (card) => card.at.at(-1).samples[0];
  const gain = (card) => card.at.length > 1 ? last(card).total - card.at[0].samples[0].total : 0;

  for (const part of DATA.sets) for (const card of part.cards) {
    card.kinds = verdicts(card, last(card));
    card.malformed = last(card).report === null;
  }
  for (const name of DATA.observations) observation.append(make("option", { value: name }, name));

  const boxes = {};
  const FILTERS = { ...Object.fromEntries(ERRORS.map((kind) => [kind, KINDS[kind]])), malformed: { name: "malformed", sign: "!" } };
  for (const [kind, about] of Object.entries(FILTERS)) {
    const count = make("span", { class: "count" });
    const box = make("input", { type: "checkbox", value: kind, onchange: update });
    kindsBox.append(make("label", { class: `badge ${kind}` }, box, make("span", { "aria-hidden": "true" }, about.sign), ` ${about.name} `, count));
    boxes[kind] = { box, count };
  }

  function textOf(card) {
    card.text ??= [card.id, card.ref || "", card.indication || "", ...card.at.flatMap((version) => version.samples.flatMap((sample) => [sample.report || sample.raw || "", sample.think || ""]))].join("\n").toLowerCase();
    return card.text;
  }

  function has(card, kind, name) {
    if (kind === "malformed") return card.malformed;
    return name ? card.kinds[name] === kind : Object.values(card.kinds).includes(kind);
  }

  function update() {
    const name = observation.value, words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = Object.keys(boxes).filter((kind) => boxes[kind].box.checked);
    const matching = DATA.sets[state.set].cards.filter((card) => (!name || name in card.kinds) && words.every((word) => textOf(card).includes(word)));
    for (const [kind, { count }] of Object.entries(boxes)) count.textContent = matching.filter((card) => has(card, kind, name)).length.toLocaleString("en");
    state.found = matching.filter((card) => !wanted.length || wanted.some((kind) => has(card, kind, name)));
    const by = { lowest: (card) => last(card).total, highest: (card) => -last(card).total, gained: (card) => -gain(card), lost: gain }[order.value];
    if (by) state.found.sort((a, b) => by(a) - by(b));
    showList();
    show(state.found.includes(state.current) ? state.current : state.found[0] || null);
  }

  function showList() {
    const total = DATA.sets[state.set].cards.length;
    document.getElementById("found").textContent = `${state.found.length.toLocaleString("en")} of ${total.toLocaleString("en")} studies`;
    list.replaceChildren();
    state.listed = 0;
    listMore();
  }

  // A list of thousands is made as far as it is looked at.
  function listMore() {
    list.querySelector(".more")?.remove();
    const cards = state.found.slice(state.listed, state.listed + LISTED_AT_ONCE);
    state.listed += cards.length;
    list.append(...cards.map(listed));
    const left = state.found.length - state.listed;
    if (left) list.append(make("li", { class: "more" }, make("button", { type: "button", onclick: listMore }, `${Math.min(left, LISTED_AT_ONCE)} more`)));
  }

  function listed(card) {
    const counts = ERRORS.map((kind) => [kind, Object.values(card.kinds).filter((own) => own === kind).length]).filter(([, n]) => n);
    const first = card.at.length > 1 ? `${card.at[0].samples[0].total.toFixed(2)} → ` : "";
    card.button = make("button", { type: "button", onclick: () => show(card, true) }, make("span", { class: "name" }, card.id),
      make("span", { class: "gain" }, `${first}${last(card).total.toFixed(2)}`),
      make("span", { class: "counts" }, counts.map(([kind, n]) => make("span", { class: kind, title: `${n} ${KINDS[kind].name}` }, make("span", { "aria-hidden": "true" }, KINDS[kind].sign), make("span", { class: "hidden" }, KINDS[kind].name), ` ${n}`)),
        card.malformed ? make("span", { class: "malformed" }, "! malformed") : null));
    return make("li", {}, card.button);
  }

  function show(card, moveFocus) {
    state.current?.button?.removeAttribute("aria-current");
    state.current = card;
    if (!card) { shownCard.replaceChildren(make("p", { class: "hint nothing" }, "No study matches. Clear the filters to see all.")); return; }
    while (state.found.indexOf(card) >= state.listed) listMore();
    card.button.setAttribute("aria-current", "true");
    const top = card.button.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + card.button.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
    if (!chosen.has(card)) chosen.set(card, {});
    const own = chosen.get(card);
    own.think = state.think;
    const at = state.found.indexOf(card) + 1;
    shownCard.replaceChildren(
      make("header", {}, make("div", {}, make("h3", {}, card.id), make("span", { class: "hint" }, `${at.toLocaleString("en")} of ${state.found.length.toLocaleString("en")}${card.split ? ` · split ${card.split}` : ""}`)),
        make("div", { class: "buttons" }, make("button", { type: "button", onclick: () => step(-1), "aria-keyshortcuts": "k" }, "← ", make("kbd", {}, "k")), make("button", { type: "button", onclick: () => step(1), "aria-keyshortcuts": "j" }, make("kbd", {}, "j"), " →"))),
      renderCard(card, own));
    if (moveFocus && matchMedia("(max-width: 56rem)").matches) shownCard.scrollIntoView({ block: "start" });
  }

  function step(by) {
    if (!state.found.length) return;
    const at = state.found.indexOf(state.current) + by;
    show(state.found[Math.max(0, Math.min(state.found.length - 1, at))]);
    const box = shownCard.getBoundingClientRect();
    if (box.top < 0 || box.top > innerHeight * 0.6) shownCard.scrollIntoView({ block: "start" });
  }

  function choose(set) {
    state.set = set;
    for (const button of document.querySelectorAll("button.set")) button.setAttribute("aria-pressed", String(Number(button.dataset.set) === set));
    const follows = DATA.sets[set].cards.some((card) => card.at.length > 1);
    const orders = { "": DATA.sets[set].order, lowest: "lowest reward first", highest: "highest reward first", ...(follows ? { gained: "largest gain first", lost: "largest loss first" } : {}) };
    order.replaceChildren(...Object.entries(orders).map(([value, title]) => make("option", { value }, title)));
    document.getElementById("about-kinds").textContent = "Counts and filters look at each study's last report: the one after training or, of a training study, the first sample of its last step.";
    update();
  }

  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(update, 120); });
  observation.addEventListener("change", update);
  order.addEventListener("change", update);
  for (const button of document.querySelectorAll("button.set")) button.addEventListener("click", () => choose(Number(button.dataset.set)));
  document.getElementById("clear").addEventListener("click", () => {
    search.value = observation.value = "";
    for (const { box } of Object.values(boxes)) box.checked = false;
    update();
  });

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target instanceof HTMLElement && event.target.matches("input, select, textarea")) return;
    if (event.key === "j" || event.key === "ArrowRight") step(1);
    else if (event.key === "k" || event.key === "ArrowLeft") step(-1);
    else if (event.key === "/") { search.scrollIntoView({ block: "center" }); search.focus(); search.select(); }
    else if (event.key === "t") {
      state.think = !state.think;
      if (state.current) chosen.get(state.current).think = state.think;
      for (const fold of shownCard.querySelectorAll("details.think")) fold.open = state.think;
    } else return;
    event.preventDefault();
  });

  if (matchMedia("(max-width: 56rem)").matches) document.getElementById("list-fold").open = false;
  choose(0);
})();
