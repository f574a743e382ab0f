// Steps through the stored states of an explorer where no kernel runs, from file:// too. Without this script, or in a
// browser that cannot unpack, the first state stands with its text.
// Contract (measured/plots.py): figure.explorer with an img, p.explorer-state and a script of JSON: controls (name,
// kind, steps), states (a step for each control, text alternative, number of the picture; 0 is the img's own), and
// pictures. The address may name a state: #explore-2:batch=8&bits=4 for the second explorer. Nothing else is kept.
"use strict";
{
  const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
  const address = (picture) =>
    picture.startsWith("<") ? "data:image/svg+xml," + encodeURIComponent(picture) : picture;

  async function unpack(pack) {
    const bytes = Uint8Array.from(atob(pack.split(",")[1]), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const [pieces, pictures] = JSON.parse(await new Response(stream).text());
    return pictures.map((numbers) => address(numbers.map((number) => pieces[number]).join("")));
  }

  // A labelled native control for one entry of controls: {label, get, set}, where get and set speak of steps.
  function control({ name, kind, steps }) {
    const label = make("label");
    if (kind === "select") {
      const select = make("select");
      select.append(...steps.map((step, i) => new Option(step, i)));
      label.append(name.replaceAll("_", " "), select);
      return { label, get: () => Number(select.value), set: (i) => (select.value = i) };
    }
    const input = make("input", { type: kind });
    if (kind === "checkbox") {
      label.append(input, name.replaceAll("_", " "));
      return { label, get: () => steps.indexOf(input.checked ? "yes" : "no"), set: (i) => (input.checked = steps[i] === "yes") };
    }
    Object.assign(input, { min: 0, max: steps.length - 1, step: 1 });
    const value = make("span", { className: "explorer-value" });
    label.append(name.replaceAll("_", " "), input, value);
    const set = (i) => {
      input.value = i;
      input.setAttribute("aria-valuetext", steps[i]);
      value.textContent = steps[i];
    };
    return { label, get: () => Number(input.value), set };
  }

  async function begin(figure, number) {
    const { controls, states, pictures } = JSON.parse(figure.querySelector("script[type='application/json']").textContent);
    if (states.length < 2) return;
    const image = figure.querySelector("img");
    const sources = [image.src, ...(await unpack(pictures))];
    const fields = controls.map(control);
    const said = make("output", { className: "explorer-said" }); // announced by screen readers when it changes
    figure.id ||= `explore-${number}`;

    function show(state) {
      const [steps, alt, picture] = state;
      Object.assign(image, { src: sources[picture], alt });
      fields.forEach((field, i) => field.set(steps[i]));
    }

    function moved(i) {
      const wanted = fields.map((field) => field.get());
      const agree = ([steps]) => steps.filter((step, j) => step === wanted[j]).length;
      const near = states.filter(([steps]) => steps[i] === wanted[i]).sort((a, b) => agree(b) - agree(a))[0];
      show(near);
      const names = controls.map(({ name, steps }, j) => [name, steps[near[0][j]]]);
      said.value = `${names.map((pair) => pair.join(" ")).join(", ")}. ${near[1]}`;
      try {
        history.replaceState(history.state, "", `#${figure.id}:${new URLSearchParams(names)}`);
      } catch {} // a page shown where its address may not change
    }

    function follow() {
      const [, id, values] = /^#(explore-\d+):(.*)$/.exec(location.hash) ?? [];
      if (id !== figure.id) return;
      const wanted = new URLSearchParams(values);
      const steps = controls.map(({ name, steps }) => (wanted.has(name) ? steps.indexOf(wanted.get(name)) : 0));
      const state = states.find(([own]) => own.every((step, i) => step === steps[i]));
      if (!state) return;
      show(state);
      figure.scrollIntoView();
    }

    const box = make("div", { className: "explorer-controls" });
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Controls of the figure");
    fields.forEach(({ label }, i) => {
      label.addEventListener("input", () => moved(i));
      if (controls[i].steps.length > 1) box.append(label);
    });
    const all = controls.reduce((product, { steps }) => product * steps.length, 1);
    if (states.length < all) box.append(make("p", { textContent: "One control moves at a time; the others go back." }));
    figure.querySelector(".explorer-state").replaceWith(box, said);
    show(states[0]);
    follow();
    addEventListener("hashchange", follow);
  }

  const start = () =>
    document.querySelectorAll("figure.explorer").forEach((figure, i) => begin(figure, i + 1).catch(console.warn));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
}
