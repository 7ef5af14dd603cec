//go:build !linux

package main

func runAgent() {}
