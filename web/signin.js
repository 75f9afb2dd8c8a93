// Signing in: the token goes to the server once and comes back as a cookie that
// no script can read.

const form = document.getElementById('form');
const token = document.getElementById('token');
const note = document.getElementById('note');

form.onsubmit = async (e) => {
  e.preventDefault();
  note.textContent = '';
  try {
    const response = await fetch('/signin', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ token: token.value }),
    });
    if (response.ok) location.reload();
    else note.textContent = refusal(response);
    token.ariaInvalid = response.status === 401;
  } catch {
    note.textContent = 'The server cannot be reached.';
  }
  token.select();
};

function refusal(response) {
  if (response.status === 401) return 'This is not the access token.';
  const seconds = response.headers.get('Retry-After') ?? 'a few';
  if (response.status === 429) return `Too many attempts. Try again in ${seconds} seconds.`;
  return `The server answered ${response.status}.`;
}
