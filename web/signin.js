// Signing in: the token goes to the server once and comes back as a cookie that
// no script can read.

const [form, token, note] = ['form', 'token', 'note'].map((id) => document.getElementById(id));

form.onsubmit = async (e) => {
  e.preventDefault();
  note.textContent = '';
  try {
    const headers = { 'Content-Type': 'application/json' }, body = JSON.stringify({ token: token.value });
    const response = await fetch('/signin', { method: 'POST', headers, body });
    if (response.ok) return location.reload();
    token.ariaInvalid = response.status === 401;
    note.textContent = refusal(response);
  } catch {
    note.textContent = 'The server cannot be reached.';
  }
  return token.select();
};

function refusal({ status, headers }) {
  if (status === 401) return 'This is not the access token.';
  if (status === 429) return `Too many attempts. Try again in ${headers.get('Retry-After') ?? 'a few'} seconds.`;
  return `The server answered ${status}.`;
}
