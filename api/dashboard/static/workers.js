"use strict";
// Workers and the queue, read anew every ten seconds while the page is seen.
setInterval(() => { if (!document.hidden) location.reload(); }, 10_000);
