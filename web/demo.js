// The demo shop: enough of a page to make a recording worth watching. It keeps
// its basket in sessionStorage and sends nothing anywhere.
"use strict";

const products = [
  { id: "bread", name: "Sourdough bread", price: 4.2, colour: "#c98b4a" },
  { id: "pears", name: "Pears, a bag", price: 3.1, colour: "#8fae3c" },
  { id: "cheese", name: "Mountain cheese", price: 6.8, colour: "#e0b53d" },
  { id: "coffee", name: "Coffee, ground", price: 7.5, colour: "#7a5138" },
  { id: "honey", name: "Heather honey", price: 5.9, colour: "#d98a1f" },
  { id: "tomatoes", name: "Tomatoes, a kilo", price: 3.6, colour: "#cc4b37" },
];

const $ = (id) => document.getElementById(id);
const money = (amount) => amount.toFixed(2);
const basket = JSON.parse(sessionStorage.getItem("basket") || "{}");

function element(tag, properties, ...children) {
  const el = Object.assign(document.createElement(tag), properties);
  el.append(...children);
  return el;
}

function total() {
  return products.reduce((sum, p) => sum + p.price * (basket[p.id] || 0), 0);
}

function put(id, amount) {
  basket[id] = Math.max(0, (basket[id] || 0) + amount);
  sessionStorage.setItem("basket", JSON.stringify(basket));
  showBasket();
}

function line(p, withButtons) {
  const li = element("li", {}, element("span", { className: "name", textContent: p.name }));
  if (withButtons) li.append(element("button", { type: "button", textContent: "−", ariaLabel: `One less: ${p.name}`, onclick: () => put(p.id, -1) }));
  li.append(element("span", { className: "amount", textContent: basket[p.id] }));
  if (withButtons) li.append(element("button", { type: "button", textContent: "+", ariaLabel: `One more: ${p.name}`, onclick: () => put(p.id, 1) }));
  li.append(element("span", { className: "price", textContent: money(p.price * basket[p.id]) }));
  return li;
}

function showBasket() {
  const chosen = products.filter((p) => basket[p.id] > 0);
  $("cart").replaceChildren(...chosen.map((p) => line(p, true)));
  $("order").replaceChildren(...chosen.map((p) => line(p, false)));
  $("cart-empty").hidden = chosen.length > 0;
  $("total").value = $("order-total").value = money(total());
  $("count").textContent = chosen.reduce((sum, p) => sum + basket[p.id], 0);
}

function showProducts(word = "") {
  const found = products.filter((p) => p.name.toLowerCase().includes(word.trim().toLowerCase()));
  $("nothing").hidden = found.length > 0;
  $("products").replaceChildren(...found.map((p) => {
    const picture = element("div", { className: "picture", textContent: p.name[0] });
    picture.style.setProperty("--colour", p.colour);
    return element("li", {}, picture,
      element("span", { className: "name", textContent: p.name }),
      element("span", { className: "price", textContent: money(p.price) }),
      element("button", { type: "button", textContent: "Add", ariaLabel: `Add ${p.name}`, onclick: () => {
        put(p.id, 1);
        window.sessionReplay?.event?.("added to basket", { product: p.id });
      } }));
  }));
}

function thank(form) {
  form.addEventListener("submit", (e) => {
    e.preventDefault();
    form.reset();
    form.querySelector(".said").hidden = false;
  });
}

// The recorder loads on its own; its session's id is there a moment later.
function showSession(tries = 0) {
  const { sessionId: id, state } = window.sessionReplay ?? {};
  if (id && state.transport) {
    $("watch").href = `/view/${encodeURIComponent(id)}`;
    $("notice").classList.add("live");
  } else if (tries < 25) {
    setTimeout(showSession, 200, tries + 1);
  } else {
    $("notice-text").textContent = "This page is not being recorded: the recorder is missing (make web), the server has an INGEST_KEY, which this page does not, or this browser asks sites not to (Global Privacy Control).";
    $("watch").hidden = true;
  }
}

const page = location.pathname.endsWith("/checkout") ? "checkout" : "shop";
$(page).hidden = false;
$(`to-${page}`).setAttribute("aria-current", "page");

showProducts();
showBasket();
thank($("account"));
thank($("pay"));
$("pay").addEventListener("submit", () => {
  for (const id of Object.keys(basket)) delete basket[id];
  put("bread", 0);
});
$("search").addEventListener("input", (e) => showProducts(e.target.value));
$("throw").addEventListener("click", () => { throw new Error("The shop’s shelf fell down"); });
$("reject").addEventListener("click", () => { Promise.reject(new Error("The delivery was refused")); });
showSession();
