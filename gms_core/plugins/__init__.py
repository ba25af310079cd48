"""Plugins: hook specifications (`hookspecs`), loading (`loading`), what hooks return (`findings`, `engines`), and the built-in checks (`machine`)."""
