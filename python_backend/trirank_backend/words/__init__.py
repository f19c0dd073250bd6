"""Words that are understood: what titles and queries are made of, which words mean or spell the like, and what was
learned of which queries which titles answer."""
