"""``python -m qnext_plugin.cli`` runs the ``qnext`` command of this interpreter."""

from qnext_plugin.cli import main

raise SystemExit(main())
