// Figures as people read them, and the few ways in which the page makes elements.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });

export const count = (number) => whole.format(number);

export const plural = (number, one, many = `${one}s`) =>
  `${count(number)} ${number === 1 ? one : many}`;

export function bytes(number) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 999.5 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${unit === 0 || number >= 99.5 ? whole.format(number) : number.toPrecision(2)} ${units[unit]}`;
}

export function seconds(number) {
  if (number < 1) return `${whole.format(number * 1000)} ms`;
  if (number < 99.5) return `${number < 9.95 ? number.toFixed(1) : whole.format(number)} s`;
  if (number < 5400) return `${whole.format(number / 60)} min`;
  return `${(number / 3600).toFixed(1)} h`;
}

/** Makes an element with a class, text and children. Text is only ever text. */
export function make(name, { className, text, ...attributes } = {}, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  for (const [attribute, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(attribute, value);
  }
  element.append(...children);
  return element;
}

export const find = (id) => document.getElementById(id);

/** Shows the text in an element that is hidden while there is none. */
export function tell(element, text) {
  element.hidden = !text;
  if (element.textContent !== (text ?? "")) element.textContent = text ?? "";
}

/** Sets an element's text only where it changes: a reader of the screen hears no repetition. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A button that deletes when it is pressed a second time within some seconds. */
export function deleteButton(what, erase) {
  const button = make("button", { className: "quiet", type: "button", text: "Delete" });
  button.setAttribute("aria-label", `Delete ${what}`);
  let timer = null;
  const disarm = () => {
    timer = null;
    button.classList.remove("armed");
    button.textContent = "Delete";
    button.setAttribute("aria-label", `Delete ${what}`);
  };
  button.addEventListener("click", async () => {
    if (timer === null) {
      timer = setTimeout(disarm, 5000);
      button.classList.add("armed");
      button.textContent = "Really?";
      button.setAttribute("aria-label", `Really delete ${what}?`);
      return;
    }
    clearTimeout(timer);
    button.disabled = true;
    try {
      await erase();
    } finally {
      button.disabled = false;
      disarm();
    }
  });
  return button;
}
