// Package test holds the end to end tests: black box, against the built slipway
// binary, on a network of namespaces (package topo). It has no code of its own
// outside its tests. test/README.md tells how to run them and what they need.
package test
