"""tilemask inside other libraries, one module each; importing tilemask imports none of them."""
