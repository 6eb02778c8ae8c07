"""The demo: `lightning_byz.demo.quickstart` trains, `lightning_byz.demo.scoreboard` shows."""
