"""Ray Serve: the application, the router, and one config file per target.

Named as what it deploys on; the library is ``ray`` itself, and every import of either is absolute.
"""
