# The same as ./dev demo and so on, for those who have make.
.PHONY: demo check test setup
demo check test setup:
	@./dev $@
